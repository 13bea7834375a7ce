"""Any vision-language model of transformers that has no file of its own here: native vision setting, own processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from knobs.vision import NativeGeometry, VisionSetting
from workers.models.family import Architecture, Config, Family, Pipeline, Registered
from workers.models.words import UNKNOWN, filter_name, language_sizes, pixel_steps, sizes

if TYPE_CHECKING:
    from PIL import Image

    from workers.models.processing import Processor

_DECIDES = "its own processor decides"


class Generic(Family):
    name = "generic"

    @property
    def registered(self) -> Mapping[str, Registered]:
        return {}

    def token_ids(self, ids: Mapping[str, int]) -> dict[str, Any]:
        return {}

    def geometry(self, config: Config, preprocessor: Config) -> NativeGeometry:
        return NativeGeometry()

    def architecture(self, config: Config) -> Architecture:
        vision = config.get("vision_config") or {}
        return Architecture(
            f"{vision.get('model_type', UNKNOWN)}: {sizes(vision)}",
            f"{UNKNOWN}: transformers' {config.get('model_type')} has it",
            language_sizes(self.language_model(config), config.get("tie_word_embeddings")),
            None,
        )

    def pipeline(self, config: Config, preprocessor: Config) -> Pipeline:
        size = (config.get("vision_config") or {}).get("image_size")
        token = config.get("image_token_id", config.get("image_token_index", UNKNOWN))
        length = config.get("image_seq_length")
        return Pipeline(
            f"{_DECIDES}; the vision tower's configuration says {size} px" if size else _DECIDES,
            (f"{_DECIDES}, the order too; its settings are:", *_settings(preprocessor)),
            f"{_DECIDES}; this family has no vision axis",
            f"{_DECIDES}. Here tensors of several samples are joined; where their sizes differ, padded with zeros if a "
            "mask or sizes beside them tell, or else refused",
            None,
            None,
            (
                f"the token with id {token}, as often as its own processor writes it",
                *([f"its configuration says {length} times an image (image_seq_length)"] if length else []),
            ),
        )

    def processor(self, tokenizer: Any, config: Config, preprocessor: Config) -> Processor:
        from workers.models.processing import PROMPT_ENTRIES, Inputs, Processor

        class WholeProcessor(Processor):
            """transformers' own processor makes everything; nothing is known of crops."""

            def __init__(self, processor: Any) -> None:
                self.processor = processor
                self.tokenizer = processor.tokenizer
                self.image_token_id = int(config.get("image_token_id", config.get("image_token_index", -1)))

            def __call__(self, images: Sequence[Image.Image], question: str, setting: VisionSetting) -> Inputs:
                content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
                if self.processor.chat_template:
                    turn = [{"role": "user", "content": content}]
                    text = self.processor.apply_chat_template(turn, add_generation_prompt=True)
                else:
                    text = self.processor.image_token * len(images) + question
                begin = self.tokenizer.bos_token
                # A template that writes the first token itself must not get a second one.
                has_begin = begin is not None and text.startswith(begin)
                made = dict(
                    self.processor(
                        images=list(images), text=text, return_tensors="pt", add_special_tokens=not has_begin
                    )
                )
                prompt = {name: made.pop(name) for name in PROMPT_ENTRIES if name in made}
                tokens = int((prompt["input_ids"] == self.image_token_id).sum())
                return Inputs(prompt, made, None, tokens)

        return WholeProcessor(tokenizer)


def _settings(preprocessor: Config) -> list[str]:
    """The settings of an image processor: what transformers' processors have in common as steps, the rest as it is."""
    values = {name: value for name, value in preprocessor.items() if value is not None}
    told = {"do_convert_rgb", "do_resize", "size", "resample", "do_center_crop", "crop_size"}
    told |= {"do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"}
    steps = ["convert to RGB"] if values.get("do_convert_rgb") else []
    if values.get("do_resize") and "size" in values:
        how = f", {filter_name(values['resample'])}" if "resample" in values else ""
        steps.append(f"resize, {_size(values['size'])}{how}")
    if values.get("do_center_crop") and "crop_size" in values:
        steps.append(f"cut out the centre, {_size(values['crop_size'])}")
    rescales = values.get("do_rescale", False) and "rescale_factor" in values
    normalises = values.get("do_normalize", False) and {"image_mean", "image_std"} <= values.keys()
    steps += pixel_steps({**values, "do_rescale": rescales, "do_normalize": normalises})
    return [*steps, *(f"{name}: {value}" for name, value in sorted(values.items()) if name not in told)]


def _size(size: Any) -> str:
    """A size as transformers writes it: a number, or a mapping of names that do not always mean sides."""
    if not isinstance(size, Mapping):
        return f"size {size}"
    return ", ".join(f"{name} {number}" for name, number in size.items() if number is not None)


FAMILY = Generic()
