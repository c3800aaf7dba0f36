//! Step 4: what a round trip and a stream cost here, beside the bare machine.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use anyhow::{Context as _, anyhow, ensure};
use serde::Deserialize;

use super::screen::Screen;
use super::worker::check_signals;
use crate::bench::{PingpongLine, StreamLine};
use crate::output::{grouped, times};
use crate::sandbox::{Minder, Sandbox};

/// One JSON line of `shmbus bench`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Figure {
    Pingpong(PingpongLine),
    Stream(StreamLine),
}

const RUNS: [(&str, &str, &str); 5] = [
    ("pingpong", "64", "exclusive"),
    ("pingpong", "64", "many"),
    ("pingpong", "8", "channel"),
    ("stream", "64", "exclusive"),
    ("stream", "64K", "exclusive"),
];

pub(super) fn run(screen: &Screen, sandbox: &Sandbox) -> anyhow::Result<()> {
    screen.heading(4, "Figures of this machine, two processes on two cores, beside the bare cache lines and memcpy")?;
    if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
        screen.line("   left out: this process may use only one core, and two processes must spin at once")?;
        return Ok(());
    }
    for (workload, size, mode) in RUNS {
        check_signals()?;
        let arguments = ["bench", workload, "--size", size, "--mode", mode, "--seconds", "1.5", "--json"];
        let mut bench = Minder(sandbox.command(arguments)?.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?);
        let stdout = bench.0.stdout.take().ok_or_else(|| anyhow!("bench without standard output"))?;
        for text in BufReader::new(stdout).lines() {
            let text = text?;
            let figure = serde_json::from_str(&text).with_context(|| format!("bench printed {text:?}"))?;
            screen.line(&describe(&figure))?;
            screen.passed("figure", &serde_json::from_str::<serde_json::Value>(&text)?)?;
        }
        let status = bench.0.wait()?;
        check_signals()?;
        ensure!(status.success(), "bench {workload} --size {size} --mode {mode} failed: {status}");
    }
    screen.line("   SMT, CCX, FAR: where the host had put our two cores (one core, one L3 cache, two L3 caches)")?;
    Ok(())
}

fn describe(figure: &Figure) -> String {
    match figure {
        Figure::Pingpong(f) => format!(
            "   round trip {:>6} B  {:<9}  {}  p50 {:>6.0} ns  p99 {:>6.0} ns   bare {:>4.0} ns   {} bare",
            f.payload_bytes,
            f.mode,
            f.class,
            f.p50_ns,
            f.p99_ns,
            f.bare_p50_ns,
            times(f.ratio_p50)
        ),
        Figure::Stream(f) => format!(
            "   stream     {:>6} B  {:<9}  {}  {:>11} messages/s  {:>6.2} GB/s   memcpy {:.0} GB/s   {} bare, {} lost",
            f.payload_bytes,
            f.mode,
            f.class,
            grouped(f.messages_per_s as u64),
            f.bytes_per_s / 1e9,
            f.bare_bytes_per_s / 1e9,
            times(f.ratio_bytes),
            f.lost
        ),
    }
}
