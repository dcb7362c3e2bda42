"""Stores and reads models: folders, model cards, the hub, published models, quantized and other projects' weights."""
