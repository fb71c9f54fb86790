"""Packaging of hf_ilora: ranges live here, the exact versions of one tested environment in requirements.lock."""

from pathlib import Path

from setuptools import find_packages, setup

DEMO = ["gradio>=6.31"]
DEEPSPEED = ["deepspeed>=0.19", "ninja>=1.11"]  # ninja: DeepSpeed compiles its operations when they are first used
INDEX = ["faiss-cpu>=1.8"]
# onnxscript: torch exports through it; onnxruntime: every export is checked and measured with it
ONNX = ["torch>=2.9", "onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"]
PLOT = ["matplotlib>=3.9"]
TENSORBOARD = ["tensorboard>=2.17"]
# sentence-transformers: title encoders that are more than a transformer with pooling; scikit-learn: TF-IDF
TITLES = ["sentence-transformers>=5.1", "scikit-learn>=1.5"]
PYTEST = ["pytest>=8.0", "pytest-timeout>=2.3", "pytest-xdist>=3.6"]
SHIPPED = ["recipes", "accelerate_configs"]

setup(
    name="hf_ilora",
    version="0.1.0",
    description="LLM recommenders that are cheap to serve: SASRec, iLoRA and DLLM2Rec as Hugging Face objects",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # Recipes and configurations have one home, at the top of the project; a wheel has them inside of the package.
    package_dir={"": "src", **{f"hf_ilora.{folder}": folder for folder in SHIPPED}},
    packages=[*find_packages("src"), *(f"hf_ilora.{folder}" for folder in SHIPPED)],
    package_data={
        "hf_ilora.recipes": ["configs/**/*.yaml", "prompts/*.txt"],
        "hf_ilora.accelerate_configs": ["*.yaml"],
        "hf_ilora_cli": ["help/*.txt"],
    },
    entry_points={"console_scripts": ["hf-ilora = hf_ilora_cli.main:main"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.7",
        "transformers>=5.23,<6",
        "accelerate>=1.12",
        "gguf>=0.17",  # transformers reads GGUF files through it
        "datasets>=5.0",
        "evaluate>=0.4.6",
        "huggingface-hub>=2.0",
        "jinja2>=3.1",  # huggingface_hub fills the template of model cards with it
        "safetensors>=0.6",
        "numpy>=2.0",
        "scipy>=1.14",
        "pandas>=2.2",
        "pyarrow>=18",
        "pyyaml>=6.0",
        "httpx2>=2.0",
        "filelock>=4.2",
        "psutil>=6.0",
        "tqdm>=4.66",
    ],
    extras_require={
        "deepspeed": DEEPSPEED,
        "demo": DEMO,
        "index": INDEX,
        "onnx": ONNX,
        "plot": PLOT,
        "tensorboard": TENSORBOARD,
        "titles": TITLES,
        "dev": [
            *DEEPSPEED,
            *DEMO,
            *INDEX,
            *ONNX,
            *PLOT,
            *TENSORBOARD,
            *TITLES,
            *PYTEST,
            "peft>=0.18",  # the tests load exported LoRAs with it
            "playwright>=1.50",  # the test of the demo drives an installed Chromium with it
            "polars>=1.0",  # its frames are read where a program has imported it
            "ruff>=0.12",
        ],
    },
)
