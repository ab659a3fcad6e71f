"""Federated learning on Flower, PyTorch and Ray for models that were trained apart on data that are not alike."""

__version__ = "0.1.0"
