"""Conversations -> the text that the model's chat template makes of them, and the parts of it that are learned.

Read ``transcript`` first; ``template`` calls the template in the way it understands, ``verification`` makes sure that
nothing of a turn is lost, ``dates`` pins the date that it prints, ``stock_marks`` knows the few templates whose labels need an exception.
"""

from metaflow_hf.data.chat.source import read_chat_template
from metaflow_hf.data.chat.template import ChatTemplate
from metaflow_hf.data.chat.transcript import Transcript, transcribe
from metaflow_hf.data.chat.verification import missing_prompt

__all__ = ["ChatTemplate", "Transcript", "missing_prompt", "read_chat_template", "transcribe"]
