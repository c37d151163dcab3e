"""Trained networks as files that others run: ONNX, torch.export, timm's folders, the Hub."""
