"""The model's mathematics on one device or one tensor-parallel rank; never talks to
torch.distributed itself."""
