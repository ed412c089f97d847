"""Which text a recipe names, and how much of it: read before any text is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compress.calibration.texts import Descriptor, SelfGenerated, TextSource, load_descriptor

DOCUMENT_TOKENS = 128
"""Of texts that are sampled beside another: short ones are sampled several times as fast, and more of them differ."""


class WindowSpec(BaseModel):
    """Which text, and how it becomes windows."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    data: str | TextSource = Field(description="name of a descriptor under calibration/, or a source inline")
    windows: int = Field(default=128, gt=0, description="number of windows")
    window_tokens: int = Field(default=512, ge=8, description="tokens in a window")
    layout: Literal["packed", "padded"] = "packed"

    @field_validator("data")
    @classmethod
    def _not_blank(cls, value: str | TextSource) -> str | TextSource:
        if isinstance(value, str) and not value.strip():
            raise ValueError("name a text, e.g. python-help")
        return value

    def descriptor(self, base: Path) -> tuple[Descriptor, Path]:
        """The descriptor and the folder its relative paths start from."""
        if isinstance(self.data, str):
            return load_descriptor(self.data, base)
        return Descriptor(name=self.data.name or self.data.kind, licence=self.data.licence, source=self.data), base


class CalibrationSpec(WindowSpec):
    """The text that calibrated stages read, and text of the source's own beside it."""

    self_generated_windows: int = Field(
        default=0,
        ge=0,
        description="windows sampled from the source model beside those of the text: what the model knows of other "
        "kinds of text, so that it is not fitted to one (docs/benchmarks/ablation.md)",
    )

    @model_validator(mode="after")
    def _not_twice(self) -> CalibrationSpec:
        sampled = self.data == "self-generated" or isinstance(self.data, SelfGenerated)
        if sampled and self.self_generated_windows:
            raise ValueError("self_generated_windows are beside a text; with data: self-generated take more windows")
        return self

    @property
    def all_windows(self) -> int:
        return self.windows + self.self_generated_windows

    @property
    def tokens(self) -> int:
        """Of all windows, if the text is long enough."""
        return self.all_windows * self.window_tokens

    @property
    def of_text(self) -> CalibrationSpec:
        """Without the windows that are sampled."""
        return self.model_copy(update={"self_generated_windows": 0})

    @property
    def of_model(self) -> WindowSpec:
        """The windows that are sampled beside the text."""
        data = SelfGenerated(document_tokens=DOCUMENT_TOKENS)
        return WindowSpec(data=data, windows=self.self_generated_windows, window_tokens=self.window_tokens)
