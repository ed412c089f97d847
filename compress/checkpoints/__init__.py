"""Model folders: finding the source, reading any of the layouts block by block, writing them without holding the model.

sources    hub id, folder, .gguf file or installed package -> a folder of safetensors
reader     `Checkpoint`: dense tensors of a block, whatever the layout
working    the layout stages write: one file a block, codes unpacked, resumable
export     the registry of formats; `compressed_tensors` and `plain` are its entries
skeleton   the transformers model without weights, into which one block at a time is loaded
stream     a safetensors writer that holds one tensor at a time
"""
