"""From crops to embeddings: Molmo's CLIP vision tower, and the pooling and projection in front of the language model.

Modules and parameters carry the names of the published checkpoint, so that this part of it loads as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from workers.models.molmoe.configuration import VisionShape

# Patches are pooled in windows of 2 by 2.
WINDOW = 2


class VisionAttention(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(shape.width, shape.width) for _ in range(4))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(crops, positions, width) to the same."""
        query, key, value = (
            projection(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (crops, heads, positions, head width)
            for projection in (self.wq, self.wk, self.wv)
        )
        # Fused kernels keep scores and softmax in float32 whatever the dtype, which is what the model was trained with.
        mixed = F.scaled_dot_product_attention(query, key, value)
        output: torch.Tensor = self.wo(mixed.transpose(1, 2).flatten(-2))
        return output


class VisionFeedForward(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.width, shape.mlp_width)
        self.w2 = nn.Linear(shape.mlp_width, shape.width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = self.w1(hidden)
        output: torch.Tensor = self.w2(inner * torch.sigmoid(1.702 * inner))  # CLIP's "quick" GELU
        return output


class VisionBlock(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.attention = VisionAttention(shape)
        self.ffn_norm = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.feed_forward = VisionFeedForward(shape)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        output: torch.Tensor = hidden + self.feed_forward(self.ffn_norm(hidden))
        return output


class VisionTransformer(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(VisionBlock(shape) for _ in range(shape.layers))


class VisionTower(nn.Module):
    """CLIP without its last norm; the outputs of some of its blocks, side by side, are the features."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.feature_blocks = [layer % shape.layers for layer in shape.feature_layers]
        self.class_embedding = nn.Parameter(torch.empty(shape.width))
        self.positional_embedding = nn.Parameter(torch.empty(shape.patches_per_side**2 + 1, shape.width))
        self.patch_embedding = nn.Linear(shape.patch_pixels, shape.width, bias=False)
        self.pre_ln = nn.LayerNorm(shape.width, eps=shape.norm_eps)
        self.transformer = VisionTransformer(shape)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Features of every patch.

        Args:
            pixel_values: (crops, patches, numbers in a patch), patches row by row, numbers by row, column, channel.

        Returns:
            (crops, patches, width * number of feature layers), without the class token.
        """
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        first = self.class_embedding.expand(len(patches), 1, -1)
        hidden = self.pre_ln(torch.cat([first, patches], dim=1) + self.positional_embedding)
        outputs = {}
        # Nothing reads the blocks behind the last feature block (published: one), so they do not run.
        for i in range(max(self.feature_blocks) + 1):
            hidden = self.transformer.resblocks[i](hidden)
            if i in self.feature_blocks:
                outputs[i] = hidden[:, 1:]
        return torch.cat([outputs[i] for i in self.feature_blocks], dim=-1)


class WindowPooling(nn.Module):
    """Attention over the patches of a window, asked by their mean."""

    def __init__(self, shape: VisionShape, feature_width: int) -> None:
        super().__init__()
        self.heads = shape.heads
        self.wq, self.wk, self.wv = (nn.Linear(feature_width, shape.width) for _ in range(3))
        self.wo = nn.Linear(shape.width, shape.width)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """(windows, patches, feature width) to (windows, width)."""
        split = (self.heads, -1)
        query = self.wq(windows.mean(dim=1)).unflatten(-1, split)  # (windows, heads, head width)
        key, value = (projection(windows).unflatten(-1, split) for projection in (self.wk, self.wv))
        # Written out: four keys are no work for a fused kernel, and the scores stay in float32 whatever the dtype.
        scores = torch.einsum("whd,wphd->whp", query.float(), key.float()) * query.shape[-1] ** -0.5
        mixed = torch.einsum("whp,wphd->whd", scores.softmax(dim=-1).to(value.dtype), value)
        output: torch.Tensor = self.wo(mixed.flatten(-2))
        return output


class ImageProjector(nn.Module):
    def __init__(self, width: int, inner: int, output: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, output, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.w2(F.silu(self.w1(features)) * self.w3(features))
        return output


class MultiModalProjector(nn.Module):
    """Marks of padding, pooling of 2 by 2 patches, and the projection to the language model's width."""

    def __init__(self, shape: VisionShape, inner: int, output: int) -> None:
        super().__init__()
        feature_width = shape.width * len(shape.feature_layers)
        self.side = shape.patches_per_side
        self.pad_embed = nn.Parameter(torch.empty(2, feature_width))  # for wholly, and for partly padded patches
        self.image_pooling_2d = WindowPooling(shape, feature_width)
        self.image_projector = ImageProjector(shape.width, inner, output)

    def forward(self, features: torch.Tensor, image_masks: torch.Tensor) -> torch.Tensor:
        """Embeddings of every window.

        The model was trained with masks shifted by one row against the crops (first comes the global view, which has
        no mask; a row of -1, "partly padded", comes last), so row r is applied to crop r here as it was there.

        Args:
            features: (crops, patches, feature width), of `VisionTower`.
            image_masks: (crops, patches), the part of each patch that is image: 0 to 1, or -1.

        Returns:
            (crops, windows, width of the language model), windows row by row.
        """
        wholly = (image_masks == 0).unsqueeze(-1)
        partly = ((image_masks < 1) & (image_masks != 0)).unsqueeze(-1)
        features = features + self.pad_embed[0] * wholly + self.pad_embed[1] * partly
        crops, windows_per_side = len(features), self.side // WINDOW
        windows = (
            features.view(crops, windows_per_side, WINDOW, windows_per_side, WINDOW, -1)
            .transpose(2, 3)
            .reshape(crops * windows_per_side**2, WINDOW**2, -1)
        )
        embeddings: torch.Tensor = self.image_projector(self.image_pooling_2d(windows))
        return embeddings.view(crops, windows_per_side**2, -1)
