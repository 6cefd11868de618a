"""Reports between processes: none is lost while the reader is busy, and none makes the sender wait."""

import asyncio
import time
from pathlib import Path

from blockft.serving.block_request import ReplyAddress
from blockft.serving.report import Report, Reporter, ReportReceiver


def test_no_report_is_lost_while_the_reader_is_busy(tmp_path: Path) -> None:
    """Linux keeps 10 datagrams for a socket."""

    async def test() -> None:
        receiver, reporter = ReportReceiver(tmp_path), Reporter()
        expected = [receiver.expect() for _ in range(200)]
        for number, (address, _) in enumerate(expected):
            reporter.send(address, Report(missing=[number]))
        time.sleep(0.1)  # the event loop is busy, and would be for ever if a report waited for it
        reports = await asyncio.wait_for(asyncio.gather(*(reports.first for _, reports in expected)), 600)
        assert [report.missing for report in reports] == [[number] for number in range(200)]
        reporter.close()
        receiver.close()
        assert not list(tmp_path.iterdir())

    asyncio.run(test())


def test_a_prompt_may_have_many_blocks(tmp_path: Path) -> None:
    """A datagram has at most 200 KB."""
    report = Report(sources=["host", "device"] * 50_000, missing=list(range(20_000)))

    async def test() -> None:
        receiver, reporter = ReportReceiver(tmp_path), Reporter()
        address, reports = receiver.expect()
        reporter.send(address, report)
        assert await asyncio.wait_for(reports.first, 600) == report
        reporter.close()
        receiver.close()

    asyncio.run(test())


def test_a_failure_that_is_reported_later_is_kept(tmp_path: Path) -> None:
    """Of two workers the second one may lack a block, and a request loads again after a preemption."""

    async def test() -> None:
        receiver, reporter = ReportReceiver(tmp_path), Reporter()
        address, reports = receiver.expect()
        for report in (
            Report(sources=["host"]),
            Report(sources=["disk"]),
            Report(missing=[0]),
            Report(failure="a"),
        ):
            reporter.send(address, report)
        assert (await asyncio.wait_for(reports.failed, 600)).missing == [0]
        assert reports.first.result().sources == ["host"]
        reporter.close()
        receiver.close()

    asyncio.run(test())


def test_a_report_to_a_reader_that_is_gone_is_dropped(tmp_path: Path) -> None:
    reporter = Reporter()
    reporter.send(ReplyAddress(socket=str(tmp_path / "gone.sock"), id="1"), Report())
    reporter.close()


def test_a_reader_that_does_not_read_costs_the_reports_alone(tmp_path: Path) -> None:
    async def test() -> None:
        receiver, reporter = ReportReceiver(tmp_path), Reporter(timeout_s=0.01)
        address, reports = receiver.expect()
        for _ in range(100):
            reporter.send(address, Report(failure="a"))
        reporter.close()  # while the event loop is busy
        assert (await asyncio.wait_for(reports.first, 600)).failure == "a"
        receiver.close()

    asyncio.run(test())
