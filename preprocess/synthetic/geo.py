"""The places of events.csv: 2,988 strings `CC`, `CC>SS` and `CC>SS>DMA` with their shares of the traffic."""

from typing import NamedTuple

import numpy as np

REGIONS = 8
DISTINCT = 2_988

# Two letters each, by traffic: states of the US, provinces of Canada, and the other countries with their long tail.
_STATES = "CATXFLNYPAILOHGANCMINJVAWAAZMATNINMOMDWICOMNSCALLAKYOROKCTUTIANVARMSKSNMNEIDWVHINHMEMTRIDESDNDAKDCVTWY"
_PROVINCES = "ONBCQCABMBSKNSNBNLPENTYTNU"
_COUNTRIES = (
    "GBAUINZASGNZPHAEMYIEDEMXHKBRILJPFRPKIDESITNLTHTRSENGSAKEPRTTJMEGCOARCHGRNODKBEPLPTROKRTWVNBDLKNPQAKWOMBHLBJOIQ"
    "MADZTNGHUGTZZMZWBWNAMUETRWCMSNCIAOMZMWMGSDLYSOCDGABJTGMLBFNETDGMGNLRSLCVSCREYTKMDJERSSBICGCFGQSTLSSZRUUABYKZUZ"
    "TMKGTJAMAZGEMDLTLVEEFIISCZSKHUATSIHRBARSMEMKALBGCYMTLULIMCSMVAADGIFOGLCLPEVEECBOPYUYGYSRGFPACRNIHNSVGTBZCUDOHT"
    "BSBBLCVCGDDMAGKNAIVGVIMSTCKYBMAWCWBQMFMQGPPMFKCNMOMNKPMMKHLABNTLMVBTAFIRSYYEPSFJPGSBVUNCPFWSTOKIFMMHPWNRTVCKNU"
    "WFASGUMPA1A2APEU"
)
_ABROAD_NEAR = {"GB", "AU", "NZ", "IE"}


def _pairs(letters: str) -> list[str]:
    return [letters[i : i + 2] for i in range(0, len(letters), 2)]


class Places(NamedTuple):
    names: np.ndarray  # [2988] str
    cumulative: np.ndarray  # [2988] float64, ends at 1
    region: np.ndarray  # [2988] uint8 in [0, REGIONS): the group the planted model knows


def _united_states() -> list[tuple[str, float, int]]:
    places = [("US", 0.022, 3)]
    market = 500
    states = _pairs(_STATES)
    for rank, state in enumerate(states):
        share = 0.78 * (rank + 4.0) ** -1.1 / sum((r + 4.0) ** -1.1 for r in range(len(states)))
        places.append((f"US>{state}", 0.01 * share, rank % 4))
        markets = max(2, 12 - rank // 4)
        weights = 1.0 / (1.0 + np.arange(markets))
        for weight in weights / weights.sum():
            places.append((f"US>{state}>{market}", 0.99 * share * weight, rank % 4))
            market = 500 + (market - 500 + 7) % 382
    return places


def places() -> Places:
    """The whole vocabulary: the United States 80 %, Canada 6.5 %, the other countries with a long tail."""
    rows, provinces, countries = _united_states(), _pairs(_PROVINCES), _pairs(_COUNTRIES)
    weights = (np.arange(len(provinces)) + 1.0) ** -1.3
    rows += [("CA", 0.001, 4)] + [(f"CA>{p}", 0.064 * w, 4) for p, w in zip(provinces, weights / weights.sum())]
    shares = (np.arange(len(countries)) + 1.5) ** -1.4
    shares *= (1.0 - sum(row[1] for row in rows)) / shares.sum()
    codes, extra = divmod(DISTINCT - len(rows) - len(countries), len(countries))
    for rank, (country, share) in enumerate(zip(countries, shares)):
        region = 5 if country in _ABROAD_NEAR else 6 if rank < 20 else 7
        rows.append((country, 0.05 * share, region))
        count = codes + (rank < extra)
        inside = (np.arange(count) + 1.0) ** -1.0
        rows += [(f"{country}>{code:02d}", 0.95 * share * w, region) for code, w in enumerate(inside / inside.sum())]
    names, traffic, regions = zip(*rows)
    cumulative = np.cumsum(traffic)
    return Places(np.array(names), cumulative / cumulative[-1], np.array(regions, np.uint8))
