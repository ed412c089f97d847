"""Model folders: finding the source, reading any of the layouts block by block, writing them without holding the model.

sources    hub id, folder, .gguf file or installed package -> a folder of safetensors
reader     `Checkpoint`: dense tensors of a block, whatever the layout
working    the layout stages write: one file a block, codes unpacked, resumable
candidates every linear in several schemes, from which mixtures are put together
formats    layouts of artifacts, one file each, with their registry; what is read back of them
export     a finished checkpoint in one of them
from_gguf, foreign   .gguf files and other tools' formats as plain folders, through their own loaders
couplings  moving a factor per channel between tensors (`rescale`, channel scaling)
skeleton   the transformers model without weights, into which one block at a time is loaded
stream     a safetensors writer that holds one tensor at a time
"""
