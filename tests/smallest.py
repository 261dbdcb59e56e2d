"""A config file for train.py: the smallest run, on the texts in the folder $CORPUS."""

import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from ml_collections import ConfigDict
from small_run import small_config


def get_config():
    config = ConfigDict(small_config(os.environ["CORPUS"]).to_dict())
    config.model.update(num_hidden_layers=1, layer_types=["full_attention"], mtp_steps=0)
    config.train.update(
        num_steps=60, checkpoint_every=4, keep_checkpoints=3, sequence_length=32, sample_tokens=0
    )
    return config
