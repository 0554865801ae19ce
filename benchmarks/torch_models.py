"""The models of two recipes written for PyTorch, to be timed beside ours.

Plain modules under the names of our parameters, so that weights go from one to the other by name:
SigLIP's two towers (`configs/pretrain/siglip_b16.py`), and a ViT, a BERT and METER's co-attention
with ALBEF's objectives (`configs/pretrain/coattention_b16.py`). Pre-norm layers, no dropout.
Attention is torch's own `scaled_dot_product_attention`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = Mapping[str, Tensor]


class Attention(nn.Module):
    """Multi-head attention of `x` over `context`, or over itself."""

    def __init__(self, config: Any):
        super().__init__()
        self.heads = config.heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(config.width, config.width) for _ in range(4)
        )

    def forward(
        self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The mask is true on keys that may be looked at."""
        context = x if context is None else context
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.query(x), self.key(context), self.value(context))
        )
        mask = None if mask is None else mask[:, None, None]
        heads = F.scaled_dot_product_attention(query, key, value, mask)
        return self.out(heads.transpose(1, 2).flatten(2))


class AttentionSublayer(nn.Module):
    """x + attention(norm(x)); a context is a stream that nothing has normalised."""

    def __init__(self, config: Any, cross: bool = False):
        super().__init__()
        self.norm = nn.LayerNorm(config.width, config.epsilon)
        self.context_norm = nn.LayerNorm(config.width, config.epsilon) if cross else None
        self.attention = Attention(config)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Self-attention, or, made with `cross`, over a context."""
        context = context if self.context_norm is None else self.context_norm(context)
        return x + self.attention(self.norm(x), context, mask)


class MlpSublayer(nn.Module):
    """x + down(gelu(up(norm(x))))."""

    def __init__(self, config: Any):
        super().__init__()
        self.norm = nn.LayerNorm(config.width, config.epsilon)
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)
        self.activation = nn.GELU("tanh" if config.activation == "gelu_tanh" else "none")

    def forward(self, x: Tensor) -> Tensor:
        """Apply the sub-layer."""
        return x + self.down(self.activation(self.up(self.norm(x))))


class Block(nn.Module):
    """The pre-norm Transformer layer."""

    def __init__(self, config: Any):
        super().__init__()
        self.self_attention = AttentionSublayer(config)
        self.mlp = MlpSublayer(config)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply the layer."""
        return self.mlp(self.self_attention(x, mask))


class Blocks(nn.Module):
    """Layers one after another."""

    def __init__(self, config: Any):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply all of them."""
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Pooling(nn.Module):
    """One learnt query attends to all tokens."""

    def __init__(self, config: Any):
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, config.width))
        self.attention = Attention(config)
        self.mlp = MlpSublayer(config)

    def forward(self, tokens: Tensor) -> Tensor:
        """One vector a picture."""
        query = self.query.expand(len(tokens), 1, -1)
        return self.mlp(self.attention(query, tokens))[:, 0]


class ImageEncoder(nn.Module):
    """A ViT, pooled by its class token, by attention, or by the mean."""

    def __init__(self, config: Any):
        super().__init__()
        self.has_class = config.pool == "class_token"
        side = config.patch_size
        places = (config.image_size // side) ** 2 + self.has_class
        self.patch = nn.Conv2d(3, config.width, side, side)
        self.class_token = nn.Parameter(torch.empty(1, config.width)) if self.has_class else None
        self.position_embedding = nn.Parameter(torch.empty(places, config.width))
        self.blocks = Blocks(config)
        self.norm = nn.LayerNorm(config.width, config.epsilon)
        self.pooling = Pooling(config) if config.pool == "attention" else None

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and the pooled vector of uint8 pictures [B, H, W, 3]."""
        pixels = (image.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1)
        tokens = self.norm(self.blocks(x + self.position_embedding))
        if self.pooling is not None:
            return tokens, self.pooling(tokens)
        return tokens, tokens[:, 0] if self.has_class else tokens.mean(1)


class TextTower(nn.Module):
    """SigLIP's text encoder, which both ways attends; the last token stands for the text."""

    def __init__(self, config: Any):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(config.max_length, config.width)
        self.blocks = Blocks(config)
        self.norm = nn.LayerNorm(config.width, config.epsilon)
        self.head = nn.Linear(config.width, config.width)

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """The pooled vector."""
        x = self.token_embedding(text) + self.position_embedding.weight[: text.shape[1]]
        return self.head(self.norm(self.blocks(x, mask))[:, -1])


class BertEmbeddings(nn.Module):
    """Word, position and type vectors, summed and normalised."""

    def __init__(self, config: Any):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocabulary_size, config.width)
        self.position_embedding = nn.Embedding(config.max_length, config.width)
        self.type_embedding = nn.Embedding(config.types, config.width)
        self.norm = nn.LayerNorm(config.width, config.epsilon)

    def forward(self, text: Tensor) -> Tensor:
        """Vectors of token ids, all of the first type."""
        places = self.position_embedding.weight[: text.shape[1]] + self.type_embedding.weight[0]
        return self.norm(self.token_embedding(text) + places)


class Bert(nn.Module):
    """A BERT of pre-norm layers."""

    def __init__(self, config: Any):
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        self.blocks = Blocks(config)
        self.norm = nn.LayerNorm(config.width, config.epsilon)

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        """Tokens; the first is the pooled vector."""
        return self.norm(self.blocks(self.embeddings(text), mask))


class CoAttentionLayer(nn.Module):
    """Self-attention, cross-attention to the other stream as it entered the layer, and MLP."""

    def __init__(self, config: Any):
        super().__init__()
        self.image_self, self.text_self = AttentionSublayer(config), AttentionSublayer(config)
        self.image_cross = AttentionSublayer(config, cross=True)
        self.text_cross = AttentionSublayer(config, cross=True)
        self.image_mlp, self.text_mlp = MlpSublayer(config), MlpSublayer(config)

    def forward(self, image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Both streams after the layer; the mask is the text's."""
        new_image = self.image_cross(self.image_self(image), mask, text)
        new_text = self.text_cross(self.text_self(text, mask), None, image)
        return self.image_mlp(new_image), self.text_mlp(new_text)


class Fusion(nn.Module):
    """Co-attention layers, and one vector of the text's first token and of the picture."""

    def __init__(self, config: Any, has_class: bool):
        super().__init__()
        self.has_class = has_class  # which then stands for the picture
        self.blocks = nn.Module()
        self.blocks.layers = nn.ModuleList(CoAttentionLayer(config) for _ in range(config.depth))
        self.image_norm = nn.LayerNorm(config.width, config.epsilon)
        self.text_norm = nn.LayerNorm(config.width, config.epsilon)
        self.image_pooler = nn.Linear(config.width, config.width)
        self.text_pooler = nn.Linear(config.width, config.width)

    def forward(self, image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The text's tokens, and the pooled vector."""
        for layer in self.blocks.layers:
            image, text = layer(image, text, mask)
        image, text = self.image_norm(image), self.text_norm(text)
        picture = image[:, 0] if self.has_class else image.mean(1)
        pooled = [self.text_pooler(text[:, 0]).tanh(), self.image_pooler(picture).tanh()]
        return text, torch.cat(pooled, dim=-1)


class TwoTower(nn.Module):
    """SigLIP: the sigmoid loss of two towers."""

    def __init__(self, config: Any):
        super().__init__()
        self.image, self.text = ImageEncoder(config.image), TextTower(config.text)
        self.contrastive = nn.Module()
        self.contrastive.logit_scale = nn.Parameter(torch.empty(()))
        self.contrastive.logit_bias = nn.Parameter(torch.empty(()))

    def forward(self, batch: Batch) -> Tensor:
        """The loss: the binary cross-entropy of all pairs, summed over candidates."""
        image = F.normalize(self.image(batch["image"])[1], dim=-1)
        text = F.normalize(self.text(batch["text"], batch["text_mask"]), dim=-1)
        head = self.contrastive
        logits = head.logit_scale.exp() * image @ text.T + head.logit_bias
        signs = 2 * torch.eye(len(logits)) - 1
        return -F.logsigmoid(signs * logits).sum(dim=-1).mean()


class CoAttentionModel(nn.Module):
    """ITC, ITM with hard negatives, and MLM over two encoders and a co-attention fusion."""

    def __init__(self, config: Any):
        super().__init__()
        self.image, self.text = ImageEncoder(config.image), Bert(config.text)
        self.fusion = Fusion(config.fusion, self.image.has_class)
        width = config.fusion.width
        self.contrastive = nn.Module()
        self.contrastive.image_projection = nn.Linear(width, config.embedding_width)
        self.contrastive.text_projection = nn.Linear(width, config.embedding_width)
        self.contrastive.temperature = nn.Parameter(torch.empty(()))
        self.matching = nn.Module()
        self.matching.classifier = nn.Linear(2 * width, 2)
        self.masked_language = nn.Module()
        self.masked_language.transform = nn.Linear(width, width)
        self.masked_language.norm = nn.LayerNorm(width, config.text.epsilon)
        self.masked_language.bias = nn.Parameter(torch.empty(config.text.vocabulary_size))

    def forward(self, batch: Batch) -> Tensor:
        """The sum of the three losses.

        The batch says which words are hidden (`masked_text`, `hidden`), and may say which partners
        are false (`false_text`, `false_image`): else they are drawn by similarity.
        """
        image, pooled_image = self.image(batch["image"])
        text, mask = self.text(batch["text"], batch["text_mask"]), batch["text_mask"]
        logits = self._similarities(pooled_image, text[:, 0])
        true = torch.arange(len(logits))
        contrastive = (F.cross_entropy(logits, true) + F.cross_entropy(logits.T, true)) / 2

        false_text, false_image = self._negatives(logits, batch)
        pictures = torch.cat([image, image, image[false_image]])
        texts = torch.cat([text, text[false_text], text])
        masks = torch.cat([mask, mask[false_text], mask])
        pooled = self.fusion(pictures, texts, masks)[1]
        labels = (torch.arange(len(pooled)) < len(image)).long()
        matching = F.cross_entropy(self.matching.classifier(pooled), labels)

        read = self.text(batch["masked_text"], mask)
        words = self._words(self.fusion(image, read, mask)[0])
        targets = torch.where(batch["hidden"], batch["text"].long(), -100)
        masked_language = F.cross_entropy(words.flatten(0, 1), targets.flatten())
        return contrastive + matching + masked_language

    def _similarities(self, image: Tensor, text: Tensor) -> Tensor:
        head = self.contrastive
        image = F.normalize(head.image_projection(image), dim=-1)
        text = F.normalize(head.text_projection(text), dim=-1)
        return image @ text.T / head.temperature

    @staticmethod
    def _negatives(logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        if "false_text" in batch:
            return batch["false_text"], batch["false_image"]
        with torch.no_grad():
            of_itself = torch.eye(len(logits), dtype=torch.bool)
            logits = logits.masked_fill(of_itself, -torch.inf)
            false_text = torch.multinomial(logits.softmax(dim=1), 1)[:, 0]
            return false_text, torch.multinomial(logits.T.softmax(dim=1), 1)[:, 0]

    def _words(self, tokens: Tensor) -> Tensor:
        head, table = self.masked_language, self.text.embeddings.token_embedding.weight
        return F.linear(head.norm(F.gelu(head.transform(tokens))), table, head.bias)


def load(model: nn.Module, params: Mapping[str, Any]) -> None:
    """Copy our parameters, a nested dict, into the module of the same names."""
    for name, parameter in model.named_parameters():
        *path, leaf = name.split(".")
        node, layer = params, ...
        for part in path:
            if part.isdigit():
                layer = int(part)
            else:
                node = node[part]
        names = ["kernel", "scale", "embedding"] if leaf == "weight" else [leaf]
        ours = next(name for name in names if name in node)
        array = np.asarray(node[ours])[layer]
        if ours == "kernel":
            array = _transposed(array, tuple(parameter.shape))
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(array.reshape(parameter.shape).copy()))


def _transposed(kernel: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Ours are [inputs…, outputs…], torch's [outputs, inputs] or [outputs, channels, y, x]."""
    if len(shape) == 4:
        return kernel.transpose(3, 2, 0, 1)
    return kernel.reshape(shape[::-1]).T
