"""Models: what is known of them before loading (`describe`), and loading them behind one interface (`load`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workers.models.registry import REGISTERED, ModelCard, describe

if TYPE_CHECKING:
    from workers.models.adapter import VisionLanguageModel

__all__ = ["REGISTERED", "ModelCard", "describe", "load"]


def load(name_or_folder: str, **options: Any) -> VisionLanguageModel:
    """Load a model by registry name, folder or hub id; see `workers.models.loading.load` for the options."""
    # Imported here: describing a model must not cost the import of torch.
    from workers.models.loading import load as load_now

    return load_now(name_or_folder, **options)
