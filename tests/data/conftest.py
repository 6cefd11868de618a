import pytest
from transformers import PreTrainedTokenizerFast

from blockft.data.encoder import Encoder
from tests.data.toys import toy_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return toy_tokenizer()


@pytest.fixture(scope="session")
def encoder(tokenizer: PreTrainedTokenizerFast) -> Encoder:
    return Encoder(tokenizer)
