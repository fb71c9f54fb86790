"""The one template of every model card, in the Jinja that `ModelCard.from_template` reads.

It is a Python module because a published model brings only Python modules along. Values are filled in unchanged: the
caller escapes them for Markdown.
"""

CARD_TEMPLATE = r"""---
{{ card_data }}
---

# {{ title }}

{% if is_ilora -%}
An adapter (iLoRA, arXiv 2408.10159) with which {{ language_model }} recommends the next of {{ items }}.
It contains the adapter, the router and the frozen SASRec; the language model is loaded by its name.
{%- else -%}
A {{ architecture }} that recommends the next of {{ items }}.
{%- endif %}

## How to use it

```python
{{ usage }}
```

{% if is_ilora -%}
The lines need the Python package hf_ilora.
{%- else -%}
The lines run the code of this repository. With the Python package hf_ilora, `import hf_ilora` makes the model load
without `trust_remote_code`.
{%- endif %}
A history lists the items of one user, oldest first. Scores are log-probabilities over the whole catalogue.

## Measurements

{% if measurements -%}
{{ measurements }}
{%- else -%}
Nothing was measured: there is no evaluation of this model. `hf-ilora evaluate` writes one, with intervals over users.
{%- endif %}
{%- for picture in pictures %}

![{{ picture.text }}]({{ picture.file }})
{%- endfor %}

## Data and training

{% if training -%}
{% if command -%}
```bash
{{ command }}
```

{% endif -%}
{{ training }}
{%- else -%}
The card was written without a record of the training.
{%- endif %}

## Limits and biases

- **Popularity.** The model learns from what people chose among the items that they were shown. It favours popular
  items, and users whose taste is rare get worse recommendations.{% if popularity %} {{ popularity }}{% endif %}
- **Cold items.** {% if cold_items %}Training has never seen {{ cold_items }} of the items. {% endif -%}
{% if is_ilora -%}
An item that training has never seen is known by its title alone: the frozen SASRec, which chooses the experts, has
  learnt nothing about it.
{%- elif counts -%}
An item that training has never seen is recommended after all others.
{%- else -%}
An item that training has never seen has a vector that no interaction has shaped. Its place is arbitrary, unless the
  vector was made from its title (`add_items`).
{%- endif %} A user without a history gets the most popular items.
- **Language of titles.** {% if is_ilora -%}
The language model reads titles as the catalogue spells them, and knows best the language that it was trained on most,
  usually English.
{%- elif counts -%}
The model reads ids; titles are shown, not read.
{%- else -%}
The model reads ids; titles are shown, not read. Where vectors of items start from their titles, they favour the
  language of the title encoder, which for the default one is English.
{%- endif %}
- **One data set.** Tastes and catalogues change: an evaluation on past interactions does not tell what people would
  have chosen had they been shown something else.

## Citation

The encoder and the evaluation are those of SASRec, the adapter of a language model is that of iLoRA, and DLLM2Rec
distils a language model's recommendations into a SASRec. Cite the papers of the parts that you use.

```bibtex
@inproceedings{kang2018sasrec,
  title     = {Self-Attentive Sequential Recommendation},
  author    = {Kang, Wang-Cheng and McAuley, Julian},
  booktitle = {IEEE International Conference on Data Mining (ICDM)},
  year      = {2018}
}

@inproceedings{kong2024ilora,
  title     = {Customizing Language Models with Instance-wise {LoRA} for Sequential Recommendation},
  author    = {Kong, Xiaoyu and Wu, Jiancan and Zhang, An and Sheng, Leheng and Lin, Hui and Wang, Xiang and
               He, Xiangnan},
  booktitle = {Advances in Neural Information Processing Systems (NeurIPS)},
  year      = {2024},
  note      = {arXiv:2408.10159}
}

@inproceedings{cui2024dllm2rec,
  title     = {Distillation Matters: Empowering Sequential Recommenders to Match the Performance of Large
               Language Models},
  author    = {Cui, Yu and Liu, Feng and Wang, Pengbo and Wang, Bohao and Tang, Heng and Wan, Yi and
               Wang, Jun and Chen, Jiawei},
  booktitle = {ACM Conference on Recommender Systems (RecSys)},
  year      = {2024},
  note      = {arXiv:2405.00338}
}
```
{%- if licence %}

## Licence

{{ licence }}
{%- endif %}
"""

__all__ = ["CARD_TEMPLATE"]
