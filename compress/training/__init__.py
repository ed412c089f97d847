"""Training a few numbers of a quantised model (scales, norm weights) against the model it came from.

relative     one trained tensor: a stored value times (1 + factor), rounded to what is stored
quantised    a linear whose weight is codes times trained scales; its gradient needs neither kept
divergence   KL divergence over the vocabulary, chunk by chunk, with its gradient
student      blocks of the quantised model with trained scales and norms in them
material     which windows train, which are kept out, in which order they come
descent      Adam with linear warm-up and decay; the state with the best held-out value is kept; goes on after a kill
whole_model  the divergence of the final logits as the objective
block_wise   the output of one block after another as the objective
"""
