"""A person's row as features: six numbers, and one-hot categories, some of them merged as in the paper."""

from __future__ import annotations

import numpy as np

MISSING = "?"

NUMBERS = ("age", "fnlwgt", "education-num", "capital-gain", "capital-loss", "hours-per-week")

COLUMNS = (
    *("age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship"),
    *("race", "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country"),
)
"""Columns in the order of the files."""

UNTOLD = "untold or rare"
SCHOOL = "school up to grade 12"
US = "United States"

_PLAIN: dict[str, str] = {
    "workclass": "Federal-gov Local-gov Private Self-emp-inc Self-emp-not-inc State-gov Without-pay",
    "education": "Assoc-acdm Assoc-voc Bachelors Doctorate HS-grad Masters Preschool Prof-school Some-college",
    "marital-status": "Divorced Married-civ-spouse Married-spouse-absent Never-married Separated Widowed",
    "occupation": "Adm-clerical Craft-repair Exec-managerial Farming-fishing Handlers-cleaners Machine-op-inspct "
    "Other-service Priv-house-serv Prof-specialty Protective-serv Sales Tech-support Transport-moving",
    "relationship": "Husband Not-in-family Other-relative Own-child Unmarried Wife",
    "race": "Amer-Indian-Eskimo Asian-Pac-Islander Black Other White",
    "sex": "Female Male",
    "native-country": "",
}

_MERGED: dict[str, dict[str, str]] = {
    "workclass": {UNTOLD: f"{MISSING} Never-worked"},
    "education": {SCHOOL: "1st-4th 5th-6th 7th-8th 9th 10th 11th 12th"},
    "marital-status": {"Married-civ-spouse": "Married-AF-spouse"},
    "occupation": {UNTOLD: f"{MISSING} Armed-Forces"},
    "native-country": {
        US: f"United-States Cuba {MISSING}",
        "countries 1": "England Germany Canada Italy France Greece Philippines",
        "countries 2": "Mexico Puerto-Rico Honduras Jamaica Columbia Laos Portugal Haiti Dominican-Republic "
        "El-Salvador Guatemala Peru Trinadad&Tobago Outlying-US(Guam-USVI-etc) Nicaragua Vietnam Holand-Netherlands",
        "countries 3": "India Iran Cambodia Taiwan Japan Yugoslavia China Hong",
        "countries 4": "South Poland Ireland Hungary Scotland Thailand Ecuador",
    },
}
"""Merged category -> the values in it, as in the authors' code; the groups of countries are theirs too."""

CATEGORIES: dict[str, dict[str, str]] = {
    name: {
        **{value: value for value in plain.split()},
        **{value: merged for merged, values in _MERGED.get(name, {}).items() for value in values.split()},
    }
    for name, plain in _PLAIN.items()
}
"""For each column, value in the file -> category that it is encoded as."""

FEATURES: tuple[str, ...] = (
    *NUMBERS,
    *(f"{name}: {category}" for name, known in CATEGORIES.items() for category in dict.fromkeys(known.values())),
)
"""Names of the encoded values."""

_PLACE = {feature: place for place, feature in enumerate(FEATURES)}


def encoded(rows: np.ndarray) -> np.ndarray:
    """Rows of strings, ``[people, 14]``, as ``[people, features]``: numbers, and 1 in the place of each category.

    The survey's weight enters as ``log(1 + fnlwgt)``, as in the paper. No statistic of any row is used.
    """
    values = np.zeros((len(rows), len(FEATURES)))
    everyone = np.arange(len(rows))
    for column, name in enumerate(COLUMNS):
        if name in NUMBERS:
            numbers = rows[:, column].astype(float)
            values[:, _PLACE[name]] = np.log1p(numbers) if name == "fnlwgt" else numbers
        else:
            known = CATEGORIES[name]
            values[everyone, [_PLACE[f"{name}: {known[value]}"] for value in rows[:, column]]] = 1
    return values
