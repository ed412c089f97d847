"""What a model takes to store, serve and compress: predicted from shapes, measured while it happens.

predict   bytes from shapes and schemes, before any work
measure   anonymous host memory of this process, and device memory, by phase
"""
