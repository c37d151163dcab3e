"""Small networks of several kinds, images for them, and a hash of a network's state."""

import hashlib

import torch
import torchvision
from torch import nn


def small_cnn(classes=5, inplace=True):
    """Eight channels on a quarter of the image, read by a mean and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace),
        nn.Conv2d(6, 8, 3, 2, 1),
        nn.ReLU(inplace),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    ).eval()


def small_vit(classes=5):
    model = torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=3,
        num_heads=2,
        hidden_dim=12,
        mlp_dim=20,
        num_classes=classes,
    )
    nn.init.normal_(model.heads.head.weight)  # it starts at zero
    return model.eval()


def small_swin(classes=5):
    return torchvision.models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=[2, 2],
        num_classes=classes,
    ).eval()


def small_maxvit(classes=5):
    return torchvision.models.MaxVit(
        input_size=(32, 32),
        stem_channels=8,
        partition_size=2,
        block_channels=[8, 12],
        block_layers=[1, 1],
        head_dim=4,
        stochastic_depth_prob=0.0,
        num_classes=classes,
    ).eval()


def resnet18(classes=5):
    return torchvision.models.resnet18(num_classes=classes).eval()


def images_of(n, height=32, width=48):
    return torch.randn(n, 3, height, width)


def state_of(model):
    """A hash of every parameter, buffer, mode, gradient and hook."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        has_grad = getattr(tensor, "grad", None) is not None
        digest.update(f"{name} {tensor.requires_grad} {has_grad}".encode() + bits.tobytes())
    for name, module in model.named_modules():
        hooks = [len(module._forward_hooks), len(module._forward_pre_hooks)]
        digest.update(f"{name} {module.training} {hooks} {len(module._backward_hooks)}".encode())
    return digest.hexdigest()
