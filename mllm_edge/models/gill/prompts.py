"""What GILL reads and says: text and pictures as they come, without roles (`generate_for_images_and_texts`).

The end of a line ends an answer that does not open with it; BOS stands before the first text. Two habits of the
original are left out: where an answer opens with a line's end it keeps whatever follows, and it goes on behind `</s>`.
"""

from __future__ import annotations

from mllm_edge.bundle.manifest import Generation, Prompt, Slot
from mllm_edge.models.gill.model import TOKENS

PICTURE = "<image>"
CAPTION = "A picture of"
QUESTION = "Draw a red circle."  # one that is answered with a picture
PROMPT = Prompt(
    "gill",
    "",
    "{text}",
    "{text}",
    "{text}\n",
    stop=["\n"],
    slots=[Slot(PICTURE, "pixels", ["image_embeds"], joint=PICTURE)],
    questions={"describe": CAPTION},
    bos_with_text=True,
    late_stop=True,
)
GENERATION = Generation(max_tokens=64, top_k=0, groups={TOKENS[0]: list(TOKENS[1:])})
