//! Figures by class: medians over chunks, as tables for people or JSON lines.

use anyhow::ensure;
use serde::{Deserialize, Serialize};

use super::args::Setup;
use super::canary::{Class, Quantiles};
use super::queue::Drained;
use super::stream::Flow;
use super::{Chunk, Chunks};
use crate::output::{Table, grouped, json_line, line, times};

/// `bench pingpong --json`.
#[derive(Serialize, Deserialize)]
pub(crate) struct PingpongLine {
    pub(crate) workload: String,
    pub(crate) payload_bytes: u64,
    pub(crate) mode: String,
    pub(crate) class: Class,
    pub(crate) chunks: usize,
    pub(crate) p50_ns: f64,
    pub(crate) p99_ns: f64,
    pub(crate) p999_ns: f64,
    pub(crate) bare_p50_ns: f64,
    pub(crate) bare_p99_ns: f64,
    pub(crate) bare_p999_ns: f64,
    pub(crate) ratio_p50: f64,
    pub(crate) ratio_p99: f64,
}

/// `bench stream --json`.
#[derive(Serialize, Deserialize)]
pub(crate) struct StreamLine {
    pub(crate) workload: String,
    pub(crate) payload_bytes: u64,
    pub(crate) mode: String,
    pub(crate) class: Class,
    pub(crate) chunks: usize,
    pub(crate) batch: u32,
    pub(crate) messages_per_s: f64,
    pub(crate) bytes_per_s: f64,
    pub(crate) bare_bytes_per_s: f64,
    pub(crate) bare_p50_ns: f64,
    /// Bytes a second over the memcpy's.
    pub(crate) ratio_bytes: f64,
    pub(crate) lost: u64,
}

/// `bench queue --json`.
#[derive(Serialize, Deserialize)]
pub(crate) struct QueueLine {
    pub(crate) workload: String,
    pub(crate) payload_bytes: u64,
    pub(crate) mode: String,
    pub(crate) class: Class,
    pub(crate) chunks: usize,
    pub(crate) batch: u32,
    pub(crate) messages_per_s: f64,
    pub(crate) bare_p50_ns: f64,
    pub(crate) lost: u64,
}

pub(super) fn pingpong(json: bool, setup: &Setup, cores: [usize; 2], chunks: &Chunks<Quantiles>) -> anyhow::Result<()> {
    let lines: Vec<PingpongLine> =
        by_class(chunks)?.iter().map(|(class, of)| pingpong_line(setup, *class, of)).collect();
    if json {
        return lines.iter().try_for_each(json_line).map_err(Into::into);
    }
    title("round trips", setup, cores)?;
    let heads = ["CLASS", "CHUNKS", "P50 NS", "P99 NS", "P99.9 NS", "BARE P50", "BARE P99", "BARE P99.9", "RATIO P50"];
    let mut table = Table::new(&heads);
    for l in &lines {
        let figures = [l.p50_ns, l.p99_ns, l.p999_ns, l.bare_p50_ns, l.bare_p99_ns, l.bare_p999_ns];
        let cells = figures.map(|ns| format!("{ns:.0}")).into_iter();
        table.row([l.class.to_string(), l.chunks.to_string()].into_iter().chain(cells).chain([times(l.ratio_p50)]));
    }
    table.print()?;
    footnote(chunks.dropped)
}

fn pingpong_line(setup: &Setup, class: Class, chunks: &[&Chunk<Quantiles>]) -> PingpongLine {
    let ours = |f: fn(&Quantiles) -> f64| rounded(median(chunks.iter().map(|c| f(&c.sample))), 10.0);
    let bare = |f: fn(&Quantiles) -> f64| rounded(median(chunks.iter().map(|c| f(&c.bare.0))), 10.0);
    let (p50_ns, p99_ns) = (ours(|q| q.p50_ns), ours(|q| q.p99_ns));
    let (bare_p50_ns, bare_p99_ns) = (bare(|q| q.p50_ns), bare(|q| q.p99_ns));
    PingpongLine {
        workload: "pingpong".to_owned(),
        payload_bytes: setup.payload_bytes(),
        mode: shmbus::Mode::from(setup.mode).to_string(),
        class,
        chunks: chunks.len(),
        p50_ns,
        p99_ns,
        p999_ns: ours(|q| q.p999_ns),
        bare_p50_ns,
        bare_p99_ns,
        bare_p999_ns: bare(|q| q.p999_ns),
        ratio_p50: rounded(p50_ns / bare_p50_ns, 1000.0),
        ratio_p99: rounded(p99_ns / bare_p99_ns, 1000.0),
    }
}

pub(super) fn stream(json: bool, setup: &Setup, cores: [usize; 2], chunks: &Chunks<Flow>) -> anyhow::Result<()> {
    let lines: Vec<StreamLine> = by_class(chunks)?.iter().map(|(class, of)| stream_line(setup, *class, of)).collect();
    if json {
        return lines.iter().try_for_each(json_line).map_err(Into::into);
    }
    title("stream", setup, cores)?;
    let heads = ["CLASS", "CHUNKS", "MSG/S", "GB/S", "MEMCPY GB/S", "RATIO", "BARE P50 NS", "LOST"];
    let mut table = Table::new(&heads);
    for l in &lines {
        table.row([
            l.class.to_string(),
            l.chunks.to_string(),
            grouped(l.messages_per_s as u64),
            format!("{:.2}", l.bytes_per_s / 1e9),
            format!("{:.2}", l.bare_bytes_per_s / 1e9),
            times(l.ratio_bytes),
            format!("{:.0}", l.bare_p50_ns),
            l.lost.to_string(),
        ]);
    }
    table.print()?;
    footnote(chunks.dropped)
}

fn stream_line(setup: &Setup, class: Class, chunks: &[&Chunk<Flow>]) -> StreamLine {
    let messages_per_s = median(chunks.iter().map(|c| c.sample.messages_per_s)).round();
    let bare_bytes_per_s = median(chunks.iter().map(|c| c.sample.bare_bytes_per_s)).round();
    let bytes_per_s = messages_per_s * setup.payload_bytes() as f64;
    StreamLine {
        workload: "stream".to_owned(),
        payload_bytes: setup.payload_bytes(),
        mode: shmbus::Mode::from(setup.mode).to_string(),
        class,
        chunks: chunks.len(),
        batch: setup.batch,
        messages_per_s,
        bytes_per_s,
        bare_bytes_per_s,
        bare_p50_ns: rounded(median(chunks.iter().map(|c| c.bare.0.p50_ns)), 10.0),
        ratio_bytes: rounded(bytes_per_s / bare_bytes_per_s, 10_000.0),
        lost: chunks.iter().map(|c| c.sample.lost).sum(),
    }
}

pub(super) fn queue(json: bool, setup: &Setup, cores: [usize; 2], chunks: &Chunks<Drained>) -> anyhow::Result<()> {
    let lines: Vec<QueueLine> = by_class(chunks)?.iter().map(|(class, of)| queue_line(setup, *class, of)).collect();
    if json {
        return lines.iter().try_for_each(json_line).map_err(Into::into);
    }
    title("queue, two consumers", setup, cores)?;
    let mut table = Table::new(&["CLASS", "CHUNKS", "MSG/S", "BARE P50 NS", "LOST"]);
    for l in &lines {
        let cells = [l.class.to_string(), l.chunks.to_string(), grouped(l.messages_per_s as u64)];
        table.row(cells.into_iter().chain([format!("{:.0}", l.bare_p50_ns), l.lost.to_string()]));
    }
    table.print()?;
    footnote(chunks.dropped)
}

fn queue_line(setup: &Setup, class: Class, chunks: &[&Chunk<Drained>]) -> QueueLine {
    QueueLine {
        workload: "queue".to_owned(),
        payload_bytes: setup.payload_bytes(),
        mode: shmbus::Mode::from(setup.mode).to_string(),
        class,
        chunks: chunks.len(),
        batch: setup.batch,
        messages_per_s: median(chunks.iter().map(|c| c.sample.messages_per_s)).round(),
        bare_p50_ns: rounded(median(chunks.iter().map(|c| c.bare.0.p50_ns)), 10.0),
        lost: chunks.iter().map(|c| c.sample.lost).sum(),
    }
}

/// A class and its chunks.
pub(super) type Of<'a, S> = (Class, Vec<&'a Chunk<S>>);

/// The chunks of each class that occurred.
pub(super) fn by_class<S>(chunks: &Chunks<S>) -> anyhow::Result<Vec<Of<'_, S>>> {
    ensure!(
        !chunks.kept.is_empty(),
        "nothing was measured: there was time for {} chunks, and the cores moved in each; set --seconds higher",
        chunks.dropped
    );
    let of = |class| (class, chunks.kept.iter().filter(|c| c.class == class).collect::<Vec<_>>());
    Ok([Class::Smt, Class::Ccx, Class::Far].map(of).into_iter().filter(|(_, chunks)| !chunks.is_empty()).collect())
}

pub(super) fn title(what: &str, setup: &Setup, cores: [usize; 2]) -> std::io::Result<()> {
    let mode = shmbus::Mode::from(setup.mode);
    let batch = if setup.batch > 1 { format!(", batches of {}", setup.batch) } else { String::new() };
    let payload = setup.payload_bytes();
    title_of(format_args!("{what}: {payload} B payload, topic mode {mode}{batch}"), cores)
}

pub(super) fn title_of(what: impl std::fmt::Display, [a, b]: [usize; 2]) -> std::io::Result<()> {
    line(format_args!("{what}, two processes on cores {a} and {b}\n"))
}

pub(super) fn footnote(dropped: usize) -> anyhow::Result<()> {
    line("\nmedians over chunks of some ms; bare: the same two processes without the bus, in the same chunks' gaps")?;
    tell_dropped(dropped)
}

/// The same where quantiles are not those of chunks.
pub(super) fn footnote_of_all(bare: &str, dropped: usize) -> anyhow::Result<()> {
    line(format_args!("\nquantiles of all in a class; bare: {bare}, by turns with the others"))?;
    tell_dropped(dropped)
}

fn tell_dropped(dropped: usize) -> anyhow::Result<()> {
    if dropped > 0 {
        line(format_args!("{dropped} chunks dropped: the cores moved meanwhile"))?;
    }
    Ok(())
}

pub(super) fn rounded(value: f64, parts: f64) -> f64 {
    (value * parts).round() / parts
}

pub(super) fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), 2.5);
    }
}
