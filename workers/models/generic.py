"""Any vision-language model of transformers that has no file of its own here: native vision setting, own processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from knobs.vision import NativeGeometry, VisionSetting
from workers.models.family import Config, Family, Registered

if TYPE_CHECKING:
    from PIL import Image

    from workers.models.processing import Processor


class Generic(Family):
    name = "generic"

    @property
    def registered(self) -> Mapping[str, Registered]:
        return {}

    def token_ids(self, ids: Mapping[str, int]) -> dict[str, Any]:
        return {}

    def geometry(self, config: Config, preprocessor: Config) -> NativeGeometry:
        return NativeGeometry()

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


FAMILY = Generic()
