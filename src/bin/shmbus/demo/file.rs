//! Step 2: a large file through `pub --chunk` and `sub`, compared by checksum.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context as _, anyhow, ensure};
use serde::Serialize;
use shmbus::{Bus, TopicOptions};

use super::screen::Screen;
use super::worker::{Digest, check_signals};
use crate::sandbox::{Minder, Sandbox};

const TOPIC: &str = "demo.file";
const FILE_BYTES: u64 = 256 << 20;
const CHUNK_BYTES: u64 = 64 << 10;

#[derive(Serialize)]
struct Found {
    bytes: u64,
    checksum: String,
    seconds: f64,
    bytes_per_s: f64,
}

pub(super) fn run(screen: &Screen, sandbox: &Sandbox, bus: &Bus) -> anyhow::Result<()> {
    screen.heading(2, "A file of 256 MiB: shmbus pub --chunk 65536 <file, shmbus sub >pipe")?;
    let path = sandbox.directory().join("file");
    let bar = screen.bar(2 * FILE_BYTES, "B");
    let sent = write_file(&path, |done| bar.set_position(done))
        .with_context(|| format!("cannot write a file of 256 MiB at {}", path.display()))?;
    // `hold`: whichever of the two is there first waits for the other.
    bus.create_topic(TOPIC, &TopicOptions { hold: true, ..TopicOptions::default() }, false)?;
    let started = Instant::now();
    let count = (FILE_BYTES / CHUNK_BYTES).to_string();
    let sub = ["sub", TOPIC, "--from", "oldest", "--count", count.as_str()];
    let mut subscriber = Minder(sandbox.command(sub)?.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?);
    let publish = ["pub", TOPIC, "--chunk", "65536"];
    let mut publisher = Minder(sandbox.command(publish)?.stdin(File::open(&path)?).stdout(Stdio::null()).spawn()?);
    let mut pipe = subscriber.0.stdout.take().ok_or_else(|| anyhow!("sub without standard output"))?;
    let received = read_all(&mut pipe, |done| bar.set_position(FILE_BYTES + done))?;
    let seconds = started.elapsed().as_secs_f64();
    bar.finish_and_clear();
    for (name, process) in [("pub", &mut publisher), ("sub", &mut subscriber)] {
        let status = process.0.wait()?;
        ensure!(status.success(), "{name} failed: {status}");
    }
    ensure!(received == (FILE_BYTES, sent), "sent 256 MiB with checksum {sent:016x}, received {received:x?}");
    std::fs::remove_file(&path)?;
    bus.remove_topic(TOPIC, true)?; // its ring need not stand beside the next step's

    let gigabytes = FILE_BYTES as f64 / seconds / 1e9;
    screen.line(&format!("   checksum of the file and of what came out: {sent:016x} (FNV-1a over 64-bit words)"))?;
    screen.holds(&format!(
        "byte for byte the same, {gigabytes:.2} GB/s from file to pipe, both processes' start included"
    ))?;
    let bytes_per_s = FILE_BYTES as f64 / seconds;
    Ok(screen.passed("file", &Found { bytes: FILE_BYTES, checksum: format!("{sent:016x}"), seconds, bytes_per_s })?)
}

/// Pseudo-random bytes (SplitMix64); the checksum of what was written.
fn write_file(path: &Path, progress: impl Fn(u64)) -> anyhow::Result<u64> {
    let mut file = File::create(path)?;
    let mut digest = Digest::default();
    let mut block = vec![0; 1 << 20];
    let mut state = 0x5368_6d42_7573_2121_u64;
    for done in 1..=FILE_BYTES / block.len() as u64 {
        for word in block.as_chunks_mut::<8>().0 {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            *word = (mixed ^ (mixed >> 31)).to_le_bytes();
        }
        digest.bytes(&block);
        file.write_all(&block)?;
        progress(done << 20);
        check_signals()?;
    }
    Ok(digest.value())
}

/// Length and checksum of everything that comes.
fn read_all(pipe: &mut impl Read, progress: impl Fn(u64)) -> anyhow::Result<(u64, u64)> {
    let mut digest = Digest::default();
    let mut block = vec![0; 1 << 20];
    let (mut filled, mut total) = (0, 0);
    loop {
        check_signals()?;
        match pipe.read(&mut block[filled..]) {
            Ok(0) => return Ok((total, digest.value())),
            Ok(count) => {
                filled += count;
                total += count as u64;
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) => return Err(e.into()),
        }
        let words = filled - filled % 8; // a pipe cuts where it likes
        digest.bytes(&block[..words]);
        block.copy_within(words..filled, 0);
        filled -= words;
        progress(total);
    }
}
