"""What is imported once, before processes are forked; nothing is computed, so that no thread is there."""

import transformers  # noqa: F401
from transformers import LlamaForCausalLM  # noqa: F401

import fastdpo.cli
import fastdpo.training.loop.trainer  # noqa: F401
import tests.training.conftest  # noqa: F401
