"""Your own model: load it, see whether it is exact, look at its prompt, keep its blocks where you like.

Any Hugging Face id or directory works in place of "demo". A model whose KV states cannot be composed exactly is
refused with the reason. Run:  python examples/03_bring_your_own_model.py [MODEL]
"""

import sys

from blockrag import BlockModel, BlockRAGError, GenerationOptions, Passage, open_store

name = sys.argv[1] if len(sys.argv) > 1 else "demo"

try:
    model = BlockModel.from_pretrained(name, store=open_store("memory://?max_bytes=1GB"))
except BlockRAGError as error:
    sys.exit(f"error: {error}")

profile = model.profile
print(f"{model.name}: {profile.layout.num_layers} layers, attention {profile.attention}")
print(f"composed against one forward under the block mask: {profile.equivalence_error:.1e}")
print(f"on logits of scale {profile.logit_scale:.1f}; {profile.layout.nbytes(1, 2):,} bytes per token in 16 bits")

passages = [
    Passage(id="a", title="Arvo", text="Arvo lies in Northern Ralia. The capital of Arvo is Tellin."),
    Passage(id="b", title="Brask", text="Brask lies in Northern Ralia. The capital of Brask is Pitza."),
]
prompt = model.template.segment(model.tokenizer, passages=passages, question="What is the capital of Brask?")
for block in prompt.blocks:
    print(f"{block.kind:8} {'local ' if block.local else 'global'} {len(block):4} tokens  {block.text!r}")

options = GenerationOptions(max_new_tokens=16)
for label in ("cold", "warm"):
    generation = model.generate(prompt, options)
    usage = generation.usage
    print(f"{label}: {generation.text.strip()!r}  reused {usage.tokens_reused}, computed {usage.tokens_computed}")

for chunk in (stream := model.stream(prompt, options)):
    print(chunk.text, end="", flush=True)
print(f"\nfirst token after {1000 * stream.result.timings.ttft_s:.1f} ms")
