"""From what users hold in their hands to captions, labels and embeddings."""
