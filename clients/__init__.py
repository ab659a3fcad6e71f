"""What a round is on a client: one Flower ClientApp."""
