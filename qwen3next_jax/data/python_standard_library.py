"""The standard library's source as a dataset of TensorFlow Datasets, made without TensorFlow.

    import tensorflow_datasets as tfds
    import qwen3next_jax.data.python_standard_library  # makes it known
    rows = tfds.data_source("python_standard_library", split="train")

A row holds a file's `name`, relative to the library, and its `text`. The version is that of the
running Python, whose library it is.
"""

import platform
from collections.abc import Iterator

import tensorflow_datasets as tfds

from qwen3next_jax.data.sources import open_source


class PythonStandardLibrary(tfds.core.GeneratorBasedBuilder):
    """The .py files of the running Python's own library, tests left out."""

    VERSION = tfds.core.Version(platform.python_version())

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="The .py files of Python's standard library, tests left out.",
            features=tfds.features.FeaturesDict(
                {"name": tfds.features.Text(), "text": tfds.features.Text()}
            ),
            homepage="https://docs.python.org/3/library/",
            license="Python Software Foundation License",
        )

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, str | None]]]:
        library = open_source("stdlib", "")
        for i in range(len(library)):
            record = library[i]
            yield record.name, {"name": record.name, "text": record.text}
