"""The places of events.csv: 2,988 strings `CC`, `CC>SS` and `CC>SS>DMA` with their shares of the traffic."""

from typing import NamedTuple

import numpy as np

REGIONS = 8
DISTINCT = 2_988

_STATES = (
    "CA TX FL NY PA IL OH GA NC MI NJ VA WA AZ MA TN IN MO MD WI CO MN SC AL LA KY OR OK CT UT IA NV AR MS KS NM NE ID WV HI NH "
    "ME MT RI DE SD ND AK DC VT WY"
).split()
_PROVINCES = "ON BC QC AB MB SK NS NB NL PE NT YT NU".split()
# Ordered by traffic; the first seven are named in the samples of the real data, the tail only needs to be long.
_COUNTRIES = (
    "GB AU IN ZA SG NZ PH AE MY IE DE MX HK BR IL JP FR PK ID ES IT NL TH TR SE NG SA KE PR TT JM EG CO AR CH GR NO DK BE PL PT RO "
    "KR TW VN BD LK NP QA KW OM BH LB JO IQ MA DZ TN GH UG TZ ZM ZW BW NA MU ET RW CM SN CI AO MZ MW MG SD LY SO CD GA BJ TG ML BF "
    "NE TD GM GN LR SL CV SC RE YT KM DJ ER SS BI CG CF GQ ST LS SZ RU UA BY KZ UZ TM KG TJ AM AZ GE MD LT LV EE FI IS CZ SK HU AT "
    "SI HR BA RS ME MK AL BG CY MT LU LI MC SM VA AD GI FO GL CL PE VE EC BO PY UY GY SR GF PA CR NI HN SV GT BZ CU DO HT BS BB LC "
    "VC GD DM AG KN AI VG VI MS TC KY BM AW CW BQ MF MQ GP PM FK CN MO MN KP MM KH LA BN TL MV BT AF IR SY YE PS FJ PG SB VU NC PF "
    "WS TO KI FM MH PW NR TV CK NU WF AS GU MP A1 A2 AP EU"
).split()
_ABROAD_NEAR = {"GB", "AU", "NZ", "IE"}


class Places(NamedTuple):
    names: np.ndarray  # [2988] str
    cumulative: np.ndarray  # [2988] float64, ends at 1
    region: np.ndarray  # [2988] uint8 in [0, REGIONS): the group the planted model knows


def _united_states() -> list[tuple[str, float, int]]:
    places = [("US", 0.022, 3)]
    market = 500
    for rank, state in enumerate(_STATES):
        share = 0.78 * (rank + 4.0) ** -1.1 / sum((r + 4.0) ** -1.1 for r in range(len(_STATES)))
        places.append((f"US>{state}", 0.01 * share, rank % 4))
        markets = max(2, 12 - rank // 4)
        weights = 1.0 / (1.0 + np.arange(markets))
        for weight in weights / weights.sum():
            places.append((f"US>{state}>{market}", 0.99 * share * weight, rank % 4))
            market = 500 + (market - 500 + 7) % 382
    return places


def places() -> Places:
    """The whole vocabulary: the United States 80 %, Canada 6.5 %, the other countries with a long tail."""
    rows = _united_states()
    weights = (np.arange(len(_PROVINCES)) + 1.0) ** -1.3
    rows += [("CA", 0.001, 4)] + [(f"CA>{p}", 0.064 * w, 4) for p, w in zip(_PROVINCES, weights / weights.sum())]
    shares = (np.arange(len(_COUNTRIES)) + 1.5) ** -1.4
    shares *= (1.0 - sum(row[1] for row in rows)) / shares.sum()
    codes, extra = divmod(DISTINCT - len(rows) - len(_COUNTRIES), len(_COUNTRIES))
    for rank, (country, share) in enumerate(zip(_COUNTRIES, shares)):
        region = 5 if country in _ABROAD_NEAR else 6 if rank < 20 else 7
        rows.append((country, 0.05 * share, region))
        count = codes + (rank < extra)
        inside = (np.arange(count) + 1.0) ** -1.0
        rows += [(f"{country}>{code:02d}", 0.95 * share * w, region) for code, w in enumerate(inside / inside.sum())]
    names, weights, region = zip(*rows)
    cumulative = np.cumsum(weights)
    return Places(np.array(names), cumulative / cumulative[-1], np.array(region, np.uint8))
