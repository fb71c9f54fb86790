"""Names the packages of hf_ilora; pyproject.toml has everything else."""

from setuptools import find_packages, setup

# Recipes and configurations have one home, at the top of the project; a wheel has them inside the package.
SHIPPED = ["recipes", "accelerate_configs"]

setup(
    package_dir={"": "src", **{f"hf_ilora.{folder}": folder for folder in SHIPPED}},
    packages=[*find_packages("src"), *(f"hf_ilora.{folder}" for folder in SHIPPED)],
)
