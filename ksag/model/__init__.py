"""Calling a model: conditionings, batches, CUDA graphs, torch.compile, and checks of what is passed in."""
