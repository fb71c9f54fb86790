"""Programs that the tests run with the real clients of a Hub, and the last line that they print."""

RECIPE = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
PUSH_MODEL = """
import sys
from hf_ilora import SASRecForNextItem
folder, repo_id, arguments = sys.argv[1], sys.argv[2], eval(sys.argv[3])
print(SASRecForNextItem.from_pretrained(folder).push_to_hub(repo_id, **arguments).oid)
"""
PUSH_LLM = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
for part in (AutoModelForCausalLM, AutoTokenizer):
    part.from_pretrained(sys.argv[1]).push_to_hub("user/llm")
"""
PUSH_ILORA = """
import sys
from hf_ilora import ILoraForRecommendation
model = ILoraForRecommendation.from_pretrained(sys.argv[1])
model.config.llm_name_or_path = sys.argv[2]
model.push_to_hub("user/adapter")
"""
USE_CARD = """
import sys
from huggingface_hub import ModelCard
exec(ModelCard.load(sys.argv[1]).text.split("```python")[1].split("```")[0])
"""


def last_line(printed: str) -> str:
    return printed.strip().splitlines()[-1]
