"""What a student is to match, and by which loss."""
