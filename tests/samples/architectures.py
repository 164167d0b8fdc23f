"""Architectures built from configurations without weights, and the tutorials' models: stock PyTorch, small inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_labels": 5,
}


def images(size):
    return {"pixel_values": torch.randn(2, 3, size, size), "labels": torch.tensor([1, 3])}


def tokens():
    return {"input_ids": torch.randint(1, 40, (2, 8))}


def vit(dropout=0.0):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        **ENCODER, image_size=16, patch_size=8, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    return transformers.ViTForImageClassification(config), images(16)


def resnet():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=5
    )
    return transformers.ResNetForImageClassification(config), images(32)


def convnext():
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextConfig(
        hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, num_labels=5, layer_scale_init_value=1.0
    )
    return transformers.ConvNextForImageClassification(config), images(16)


def bert(dropout=0.0):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        **ENCODER,
        vocab_size=40,
        max_position_embeddings=8,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return transformers.BertForSequenceClassification(config), tokens() | {"labels": torch.tensor([1, 3])}


def gpt2(dropout=0.0):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=40,
        n_positions=8,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    inputs = tokens()
    return transformers.GPT2LMHeadModel(config), inputs | {"labels": inputs["input_ids"]}


def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    inputs = tokens()
    return transformers.LlamaForCausalLM(config), inputs | {"labels": inputs["input_ids"]}


def t5(feed_forward="relu", dropout=0.0):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=40,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        dropout_rate=dropout,
        feed_forward_proj=feed_forward,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    inputs = tokens()
    return transformers.T5ForConditionalGeneration(config), inputs | {"labels": inputs["input_ids"]}


class Mixing(nn.Sequential):
    """A two-layer perceptron over the last dimension."""

    def __init__(self, width, hidden):
        super().__init__(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


class MixerBlock(nn.Module):
    """Tokens mixed, then channels: (N, tokens, channels) -> the same."""

    def __init__(self, tokens, channels):
        super().__init__()
        self.norm1, self.tokens = nn.LayerNorm(channels), Mixing(tokens, 2 * tokens)
        self.norm2, self.channels = nn.LayerNorm(channels), Mixing(channels, 2 * channels)

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer over patches of 4 x 4; Tolstikhin et al., 2021."""

    def __init__(self, size=16, channels=16, classes=5):
        super().__init__()
        self.patches = nn.Conv2d(3, channels, 4, stride=4)
        self.blocks = nn.ModuleList(MixerBlock((size // 4) ** 2, channels) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, classes)

    def forward(self, pixel_values):
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


@dataclass(frozen=True)
class Architecture:
    """build() -> (model, inputs); the paths of its blocks, and the kind of site that each has fused, None for any."""

    build: Callable
    blocks: tuple[str, ...]
    kind: str | None = None

    def on(self, device):
        model, inputs = self.build()
        return model.to(device), {key: value.to(device) for key, value in inputs.items()}


def numbered(path, *counts):
    """The paths that count up where the given one has braces."""
    return tuple(path.format(*at) for at in product(*map(range, counts)))


ARCHITECTURES = {
    "ViT": Architecture(vit, numbered("vit.layers.{}", 2)),
    "ResNet": Architecture(resnet, ()),
    "ConvNeXt": Architecture(convnext, numbered("convnext.encoder.stages.{}.layers.{}", 2, 2)),
    "BERT": Architecture(bert, numbered("bert.encoder.layer.{}", 2)),
    "GPT-2": Architecture(gpt2, numbered("transformer.h.{}", 2)),
    "Llama": Architecture(llama, numbered("model.layers.{}", 2), "gated"),
    "T5": Architecture(t5, numbered("encoder.block.{}", 2) + numbered("decoder.block.{}", 2)),
    "T5 gated": Architecture(
        lambda: t5("gated-gelu"), numbered("encoder.block.{}", 2) + numbered("decoder.block.{}", 2), "gated"
    ),
    "Mixer": Architecture(lambda: (Mixer(), images(16)), numbered("blocks.{}", 2)),
}


def answer(model, inputs):
    """(logits, loss)"""
    if isinstance(model, Mixer):
        logits = model(inputs["pixel_values"])
        return logits, F.cross_entropy(logits, inputs["labels"])
    output = model(**inputs)
    return output.logits, output.loss


# The tutorials' models, as they are written there


class Logistic(nn.Module):
    """S1."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(3, 1), nn.Sigmoid())

    def forward(self, x):
        x = self.layer(x)
        return x


class XOR(nn.Module):
    """S3."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid())
        self.layer2 = nn.Sequential(nn.Linear(2, 1), nn.Sigmoid())

    def forward(self, x):
        x = self.layer1(x)
        x = self.layer2(x)
        return x


def perceptron():
    """S6: one ReLU at two places."""
    relu = nn.ReLU()
    return nn.Sequential(nn.Linear(784, 256), relu, nn.Linear(256, 256), relu, nn.Linear(256, 10))


class MyModel(nn.Module):
    """S7."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, 7, padding=3)
        self.conv2 = nn.Conv2d(10, 50, 7, padding=3)
        self.conv3 = nn.Conv2d(50, 120, 7, padding=3)
        self.conv4 = nn.Conv2d(120, 100, 5)
        self.conv5 = nn.Conv2d(100, 20, 5)
        self.conv6 = nn.Conv2d(20, 10, 5)
        self.conv7 = nn.Conv2d(10, 10, 3)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1 = nn.Linear(10 * 8 * 8, 120)
        self.fc2 = nn.Linear(120, 360)
        self.fc3 = nn.Linear(360, 50)
        self.fc4 = nn.Linear(50, 10)

    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = F.relu(self.conv3(x))
        x = F.relu(self.conv4(x))
        x = F.relu(self.conv5(x))
        x = self.pool(F.relu(self.conv6(x)))
        x = x.view(-1, 10 * 8 * 8)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        x = F.relu(self.fc3(x))
        x = self.fc4(x)

        return x


# name: the model, its loss, the shape of its input, and the layers whose activation is fused
TUTORIALS = {
    "S1": (Logistic, nn.BCELoss(), (8, 3), {"layer.0"}),
    "S3": (XOR, nn.BCELoss(), (8, 2), {"layer1.0", "layer2.0"}),
    "S5": (lambda: nn.Linear(784, 10), nn.CrossEntropyLoss(), (8, 784), set()),
    "S6": (perceptron, nn.CrossEntropyLoss(), (8, 784), {"0", "2"}),
    "S7": (
        MyModel,
        nn.CrossEntropyLoss(),
        (2, 1, 28, 28),
        {*(f"conv{i}" for i in range(1, 7)), *(f"fc{i}" for i in range(1, 4))},
    ),
}
