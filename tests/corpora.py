"""The same texts in every format that is read, written by the formats' own libraries."""

import gzip
import json
import random

import pyarrow
import pyarrow.parquet
import tensorflow_datasets as tfds
import zstandard
from array_record.python import array_record_module

WRITTEN = ("text", "jsonl", "gzip", "zstd", "parquet", "array_record", "tfds")


def write(kind, folder, texts, files=3):
    """Writes texts that `open_source(**returned)` reads."""
    folder.mkdir(parents=True)
    if kind == "tfds":
        return dict(source="tfds", path=str(write_tfds(folder, texts)))
    if kind == "text":
        for i, text in enumerate(texts):
            (folder / f"{i:03}.txt").write_bytes(text.encode())
        return dict(source="text", path=f"{folder}/*.txt")
    suffix, source, write_file = {
        "jsonl": (".jsonl", "jsonl", write_jsonl),
        "gzip": (".jsonl.gz", "jsonl", lambda path, part: write_packed(path, part, gzip.compress)),
        "zstd": (
            ".jsonl.zst",
            "jsonl",
            lambda path, part: write_packed(path, part, zstandard.compress),
        ),
        "parquet": (".parquet", "parquet", write_parquet),
        "array_record": (".array_record", "array_record", write_array_record),
    }[kind]
    size = -(-len(texts) // files)
    for i in range(files):
        write_file(folder / f"{i}{suffix}", texts[i * size : (i + 1) * size])
    field = "" if kind == "array_record" else "text"
    return dict(source=source, path=f"{folder}/*{suffix}", field=field)


def json_lines(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts))


def write_jsonl(path, texts):
    path.write_text(json_lines(texts))


def write_packed(path, texts, compress):
    # Several members or frames one after another, as parallel compressors write them.
    lines = json_lines(texts).encode()
    path.write_bytes(compress(lines[:100]) + compress(lines[100:]))


def write_parquet(path, texts):
    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=7)


def write_array_record(path, texts):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for text in texts:
        writer.write(text.encode())
    writer.close()


def write_tfds(folder, texts):
    class Texts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "texts"
        pkg_dir_path = folder

        def _info(self):
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": ((i, {"text": text}) for i, text in enumerate(texts))}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Texts(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return builder.data_dir


def make_texts(count=100, seed=0, longest=30):
    rng = random.Random(seed)
    words = ["def", "return", "self", "value", "(x)", "=", "\n", "    ", "é"]
    return [f"{i} " + " ".join(rng.choices(words, k=rng.randrange(longest))) for i in range(count)]
