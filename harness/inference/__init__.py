"""What predict.py is made of: images without labels or with, probabilities, sets of classes."""
