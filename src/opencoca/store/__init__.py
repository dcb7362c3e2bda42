"""Models on disk and on the hub: folders, cards, published names, quantized weights, other projects' weights."""
