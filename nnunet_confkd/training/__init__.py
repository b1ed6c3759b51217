"""The method: losses, network, hints, batches, and the trainer that joins them."""
