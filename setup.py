"""What pyproject.toml cannot say: the wheel has conf/ inside the package `runner`, where no other package's is."""

from setuptools import find_packages, setup

PACKAGES = ("runner", "runner.*", "models", "models.*", "data", "data.*")

setup(
    py_modules=["holdfast"],
    packages=[*find_packages(include=PACKAGES), "runner.conf"],
    package_dir={"runner.conf": "conf"},
)
