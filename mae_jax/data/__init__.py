"""From stored images to uint8 batches of this host's share."""
