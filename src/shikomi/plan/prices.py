"""What training costs: rented hours by a dated table of offers, or the electricity of a machine of your own."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path

import yaml

from shikomi.errors import BadInput, Problem, nearest
from shikomi.plan.estimate import Range
from shikomi.plan.hardware import Hardware

TABLE = Path(__file__).with_name("prices.yaml")
OLD_DAYS = 180
DEAREST = 10_000.0  # US dollars an hour; more is a slip of the pen


@dataclass(frozen=True)
class Offer:
    """One hour of one machine in US dollars, as read on a day."""

    provider: str
    machine: str
    kind: str  # "on-demand", or "spot": cheaper, and can be taken away
    usd: float
    date: date
    source: str


@dataclass(frozen=True)
class Prices:
    """The whole table: offers, household electricity, and units of each currency for one US dollar."""

    offers: tuple[Offer, ...]
    usd_per_kwh: Range
    electricity_date: date
    electricity_source: str
    per_usd: dict[str, float]
    currency_date: date
    unknown_watts: dict[str, Range]

    def of(self, machine: str) -> list[Offer]:
        return [offer for offer in self.offers if offer.machine == machine]


@dataclass(frozen=True)
class Hourly:
    """What an hour costs in US dollars, how that is known, and since when (None: it was given)."""

    usd: Range
    basis: str
    since: date | None


@dataclass(frozen=True)
class Cost:
    """What a run costs, in `currency`."""

    amount: Range
    currency: str
    basis: str
    warnings: tuple[str, ...] = ()


@cache
def read_prices(path: Path = TABLE) -> Prices:
    """The table. Raises BadInput for a price that is none."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    offers = tuple(Offer(**entry) for entry in content["offers"])
    power, money = content["electricity"], content["currencies"]
    wrong = [f"{o.provider}, {o.machine}: {o.usd}" for o in offers if not _sensible(o.usd) or o.usd == 0]
    wrong += [f"{code}: {rate}" for code, rate in money["per_usd"].items() if not _sensible(rate) or rate == 0]
    if wrong:
        raise BadInput([Problem("not a price", str(path), found=text, allowed="a number above 0") for text in wrong])
    return Prices(
        offers=offers,
        usd_per_kwh=Range(*power["usd_per_kwh"]),
        electricity_date=power["date"],
        electricity_source=power["source"],
        per_usd=money["per_usd"],
        currency_date=money["date"],
        unknown_watts={device: Range(*watts) for device, watts in content["unknown_watts"].items()},
    )


def _sensible(value: float) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= DEAREST


def check_price(text: str, what: str = "--price") -> float:
    """A price as it was typed: US dollars, 0 to 10,000. Raises BadInput."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not _sensible(value):
        allowed, fix = f"US dollars, 0 to {DEAREST:,.0f}", f"{what} 2.5"
        raise BadInput([Problem(f"{what} is no price", found=text, allowed=allowed, fix=fix)])
    return value


def check_currency(code: str, prices: Prices | None = None) -> str:
    """A currency's code in capitals. Raises BadInput for one that the table has no rate of."""
    known, code = (prices or read_prices()).per_usd, code.upper()
    if code not in known:
        close = nearest(code, known)
        fix = f"did you mean {close}?" if close else "--currency USD, and change it yourself"
        raise BadInput([Problem("unknown currency", found=code, allowed=", ".join(known), fix=fix)])
    return code


def hourly(machine: Hardware | str, price: float | None = None, prices: Prices | None = None) -> Hourly:
    """What an hour of a machine costs: as given, by the offers, or its electricity.

    `machine` is one of the table, or the device ("cpu", "cuda", "mps") of one that is not: then its power is only
    known roughly. Offers give the cheapest, the median of those on demand, and the dearest.
    """
    prices = prices or read_prices()
    if price is not None:
        return Hourly(Range.exact(price), f"${price:,.2f} an hour, as given", None)
    if isinstance(machine, str):
        return _electricity(prices.unknown_watts[machine], prices)
    offers = prices.of(machine.name)
    if not (machine.rented and offers):
        return _electricity(Range.exact(machine.watts), prices)
    on_demand = [offer.usd for offer in offers if offer.kind == "on-demand"] or [offer.usd for offer in offers]
    every = [offer.usd for offer in offers]
    usd = Range(min(every), statistics.median(on_demand), max(every))
    newest = max(offer.date for offer in offers)
    names = ", ".join(dict.fromkeys(offer.provider.split()[0] for offer in offers))
    between = f"${usd.low:,.2f}" if usd.low == usd.high else f"${usd.low:,.2f} to ${usd.high:,.2f}"
    return Hourly(usd, f"{between} an hour ({names}; {newest})", newest)


def _electricity(watts: Range, prices: Prices) -> Hourly:
    """An hour's electricity in a household."""
    per = prices.usd_per_kwh
    power = f"{watts.low:g} W" if watts.low == watts.high else f"{watts.low:g} to {watts.high:g} W"
    basis = f"electricity: {power} at ${per.low:.2f} to ${per.high:.2f} a kWh ({prices.electricity_date})"
    return Hourly(per * watts * (1 / 1000), basis, prices.electricity_date)


def cost(seconds: Range, per_hour: Hourly, currency: str = "USD", prices: Prices | None = None,
         today: date | None = None) -> Cost:  # fmt: skip
    """The cost of a run, with a warning for prices and rates older than 180 days. Raises BadInput for the currency."""
    prices, today = prices or read_prices(), today or date.today()
    code = check_currency(currency, prices)
    warnings = []
    if per_hour.since is not None and (today - per_hour.since).days > OLD_DAYS:
        warnings.append(
            f"prices are of {per_hour.since}, {(today - per_hour.since).days} days old: --price takes today's"
        )
    if code != "USD" and (today - prices.currency_date).days > OLD_DAYS:
        warnings.append(
            f"the rate of {code} is of {prices.currency_date}, {(today - prices.currency_date).days} days old"
        )
    amount = seconds * (1 / 3600) * per_hour.usd * prices.per_usd[code]
    return Cost(amount, code, per_hour.basis, tuple(warnings))
