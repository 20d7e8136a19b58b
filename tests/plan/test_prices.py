"""Machines and prices: what the tables say, what is refused, and when a price is old."""

from datetime import date, timedelta

import pytest
import yaml

from shikomi.errors import BadInput
from shikomi.plan import prices
from shikomi.plan.estimate import Range
from shikomi.plan.hardware import hardware, table
from shikomi.plan.prices import OLD_DAYS, check_currency, check_price, cost, hourly, read_prices

DAY = date(2026, 7, 1)


def test_every_machine_asked_for_is_there_with_a_source():
    known = table()
    for name in ("rtx-3060", "rtx-4060-ti-16gb", "rtx-3090", "rtx-4090", "rtx-5090", "l4", "a10g", "a100-40gb",
                 "a100-80gb", "h100-80gb", "h200", "t4", "v100-16gb", "m1-8gb", "m4-max-128gb", "cpu-8gb", "cpu-16gb",
                 "cpu-32gb", "phone-4gb", "phone-6gb", "phone-8gb"):  # fmt: skip
        machine = known[name]
        assert machine.source and machine.watts > 0 and machine.bandwidth > 1e9
        assert 0 <= machine.reserved_bytes < machine.memory_bytes
        assert 0 < machine.share.low < machine.share.likely < machine.share.high < 1
        assert machine.flops["fp32"] <= max(machine.flops.values())


@pytest.mark.parametrize(
    "name, dtype, storage, arithmetic",
    [
        ("rtx-4090", "auto", "bf16", "bf16"),
        ("t4", "auto", "fp16", "fp16"),  # no bf16 units
        ("cpu-16gb", "auto", "bf16", "fp32"),
        ("m4-16gb", "auto", "bf16", "fp32"),
        ("rtx-4090", "fp32", "fp32", "fp32"),
    ],
)
def test_dtypes_are_those_that_a_run_would_choose(name, dtype, storage, arithmetic):
    machine = hardware(name).machine(dtype)
    assert (machine.storage, machine.arithmetic) == (storage, arithmetic)


def test_a_dtype_that_a_machine_does_not_have_is_refused():
    for name, dtype in (("t4", "bf16"), ("cpu-8gb", "fp16")):
        with pytest.raises(BadInput):
            hardware(name).machine(dtype)


def test_an_unknown_machine_names_the_nearest():
    with pytest.raises(BadInput, match="did you mean rtx-4090"):
        hardware("rtx-4080")
    assert hardware("RTX 4090") is hardware("rtx-4090")


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "free", "", "1e9"])
def test_nonsense_is_no_price(text):
    with pytest.raises(BadInput, match="no price"):
        check_price(text)


def test_a_price_may_be_nothing_and_a_decimal():
    assert check_price("0") == 0.0
    assert check_price("2.5") == 2.5


def test_an_unknown_currency_is_refused():
    with pytest.raises(BadInput, match="JPY"):
        check_currency("YEN")
    assert check_currency("jpy") == "JPY"


def test_a_given_price_is_taken_exactly_and_without_a_warning():
    found = cost(Range(3600, 7200, 10800), hourly(hardware("h100-80gb"), 2.5), today=date(2099, 1, 1))
    assert found.amount == Range(2.5, 5.0, 7.5)
    assert found.warnings == ()


def test_offers_give_the_cheapest_the_middle_and_the_dearest():
    found = hourly(hardware("a100-80gb"))
    every = [offer.usd for offer in read_prices().of("a100-80gb")]
    assert found.usd.low == min(every) and found.usd.high == max(every)
    assert min(every) < found.usd.likely < max(every)
    assert len({offer.provider for offer in read_prices().offers}) >= 5


def test_a_machine_of_ones_own_costs_electricity():
    laptop = hardware("cpu-16gb")
    per = read_prices().usd_per_kwh
    found = hourly(laptop)
    assert found.usd.likely == pytest.approx(laptop.watts / 1000 * per.likely)
    unknown = hourly("cpu")
    assert unknown.usd.low < found.usd.likely < unknown.usd.high


def test_another_currency_is_the_same_money():
    hour = hourly(hardware("rtx-4090"), 1.0)
    dollars, yen = (cost(Range.exact(3600), hour, code, today=DAY).amount.likely for code in ("USD", "JPY"))
    assert dollars == 1.0
    assert yen == read_prices().per_usd["JPY"] > 50


def test_an_old_price_is_said():
    hour = hourly(hardware("rtx-4090"))
    fresh = cost(Range.exact(60), hour, today=hour.since + timedelta(days=OLD_DAYS))
    old = cost(Range.exact(60), hour, today=hour.since + timedelta(days=OLD_DAYS + 1))
    assert fresh.warnings == ()
    assert len(old.warnings) == 1 and str(hour.since) in old.warnings[0] and "--price" in old.warnings[0]
    rates = cost(Range.exact(60), hour, "EUR", today=read_prices().currency_date + timedelta(days=OLD_DAYS + 1))
    assert any("EUR" in line for line in rates.warnings)


@pytest.mark.parametrize("price", [-2.0, 0, float("nan"), "cheap", 50_000])
def test_a_table_with_nonsense_is_refused(price, tmp_path):
    content = yaml.safe_load(prices.TABLE.read_text())
    content["offers"][3]["usd"] = price
    file = tmp_path / "prices.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(BadInput, match="not a price"):
        read_prices(file)


def test_every_offer_is_for_a_known_machine_with_day_and_source():
    for offer in read_prices().offers:
        assert offer.machine in table() and offer.source and offer.kind in ("on-demand", "spot")
        assert date(2025, 1, 1) < offer.date <= date.today()
