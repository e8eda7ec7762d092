"""Maps the folder `transforms/` to the package `funcgrad.transforms`; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

engine = ["funcgrad.transforms", *(f"funcgrad.transforms.{name}" for name in find_packages("transforms"))]
setup(
    packages=[
        "funcgrad",
        *(f"funcgrad.{name}" for name in find_packages("funcgrad")),
        "funcgrad.viewing.assets",
        *engine,
    ],
    package_dir={"funcgrad.transforms": "transforms"},
    package_data={"funcgrad": ["py.typed"], "funcgrad.viewing.assets": ["*"]},
)
