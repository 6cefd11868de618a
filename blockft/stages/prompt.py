"""The wording of RAG prompts, from the settings."""

from blockft.config import DataSettings
from blockft.data.rag import RagPrompt


def rag_prompt(data: DataSettings) -> RagPrompt:
    """How prompts are worded and which documents stand where.

    Raises:
        UserError: a template of `data.prompt` is faulty.
    """
    return RagPrompt(
        instruction=data.prompt.instruction,
        document=data.prompt.document,
        question=data.prompt.question,
        documents_in=data.prompt.documents_in,
        order=data.order,
        num_documents=data.num_documents,
        seed=data.seed,
    )
