//! The registry: the journal of [`Event`]s from which a restarted coordinator learns what the bus holds.
//!
//! ```text
//!    0  segment header      magic u64 · layout u32 · kind u32 = 1 · len_bytes u64 · bus u64
//! 4096  active              u64   which half is in force
//! 4160  used[0]             u64   bytes of the first half that count
//! 4224  used[1]             u64   bytes of the second half that count
//! 4288  boot                u64   identifies the boot of the machine that it was written in
//! 8192  first half, second half:  records of  length u32 · checksum u32 · postcard bytes
//! ```
//!
//! An append writes the record, then the half's `used`: torn in between, it never happened. A full half is compacted:
//! a snapshot goes into the other half, then its `used`, then `active` changes by one write of eight bytes. Only the
//! coordinator has the descriptor, one at a time, and writes come from one thread, so a successor sees them in order;
//! `pwrite` of an aligned word is not torn by death. There is no mapping and hence no unsafe code here.
//!
//! It has a name in the socket directory and so survives the death of coordinator and keeper (`adoption.rs`). A new one is
//! written beside it and takes the name by one rename. Nothing is synced: what must survive is processes, not the machine.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use crate::coordinator::protocol::PROTOCOL_VERSION;
use crate::coordinator::state::Event;
use crate::os::memfd;
use crate::shm::layout::LAYOUT_VERSION;

/// Size of a half to start with; doubled as often as a snapshot asks for it.
pub(crate) const FIRST_HALF_BYTES: u64 = 64 << 10;

/// Largest half that is believed: more than every limit of the coordinator can fill.
const MAX_HALF_BYTES: u64 = 1 << 30;

const MAGIC: u64 = u64::from_le_bytes(*b"SHMBUS\0\x01");
const KIND: u32 = 1;
const BUS_OFFSET: u64 = 24;
const ACTIVE_OFFSET: u64 = 4096;
const USED_OFFSETS: [u64; 2] = [4160, 4224];
const BOOT_OFFSET: u64 = 4288;
const HALVES_OFFSET: u64 = 8192;
const RECORD_HEADER_BYTES: usize = 8;

/// Why a registry cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegistryError {
    #[error("registry field `{field}` is {found}, expected {expected}")]
    Field { field: &'static str, found: u64, expected: u64 },
    #[error("registry record at byte {at} is garbled: {problem}")]
    Record { at: usize, problem: &'static str },
    #[error("registry: {0}")]
    Io(#[from] io::Error),
}

/// Why an event was not appended. Nothing was logged.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AppendError {
    /// The half is full: compact, or grow.
    #[error("the registry's half is full")]
    Full,
    #[error("registry: {0}")]
    Io(#[from] io::Error),
}

/// The journal, open for appending.
#[derive(Debug)]
pub(crate) struct Registry {
    file: File,
    /// Where it is found; `None` in tests.
    path: Option<PathBuf>,
    half_bytes: u64,
    active: usize,
    used: u64,
}

impl Registry {
    /// A new registry that holds `events`, with halves of at least `half_bytes` that leave room for as much again. It takes
    /// the place of what is at `path`.
    pub(crate) fn create(path: Option<&Path>, bus: u64, half_bytes: u64, events: &[Event]) -> io::Result<Registry> {
        let records = encode_all(events)?;
        let half_bytes = half_bytes.max(2 * records.len() as u64).next_power_of_two();
        let len = HALVES_OFFSET + 2 * half_bytes;
        let beside = path.map(|path| path.with_extension("registry-new"));
        let file = match &beside {
            Some(beside) => reserved_file(beside, len)?,
            None => File::from(memfd::create("shmbus-registry", len)?),
        };
        let path = path.map(Path::to_owned);
        let registry = Registry { file, path, half_bytes, active: 0, used: records.len() as u64 };
        registry.file.write_all_at(&records, HALVES_OFFSET)?;
        registry.put(USED_OFFSETS[0], registry.used)?;
        registry.file.write_all_at(&header(len, bus), 8)?;
        registry.put(BOOT_OFFSET, boot()?)?;
        registry.put(0, MAGIC)?;
        if let (Some(beside), Some(path)) = (&beside, &registry.path) {
            fs::rename(beside, path)?;
        }
        Ok(registry)
    }

    /// Takes over a registry that is found at `path`; the events are all that was ever completely appended, compacted or not.
    pub(crate) fn open(fd: OwnedFd, path: Option<&Path>) -> Result<(Registry, Vec<Event>), RegistryError> {
        let file = File::from(fd);
        let len = file.metadata()?.len();
        let half_bytes = len.saturating_sub(HALVES_OFFSET) / 2;
        if half_bytes == 0 || half_bytes > MAX_HALF_BYTES {
            return Err(RegistryError::Field {
                field: "size",
                found: len,
                expected: HALVES_OFFSET + 2 * FIRST_HALF_BYTES,
            });
        }
        check_header(&file, len)?;
        let active = get(&file, ACTIVE_OFFSET)?;
        if active > 1 {
            return Err(RegistryError::Field { field: "active", found: active, expected: 1 });
        }
        let active = active as usize;
        let used = get(&file, USED_OFFSETS[active])?;
        if used > half_bytes {
            return Err(RegistryError::Field { field: "used", found: used, expected: half_bytes });
        }
        let registry = Registry { file, path: path.map(Path::to_owned), half_bytes, active, used };
        let mut records = vec![0; used as usize];
        registry.file.read_exact_at(&mut records, registry.half_offset(active))?;
        let events = decode_all(&records)?;
        Ok((registry, events))
    }

    /// Logs one event, whole or not at all.
    pub(crate) fn append(&mut self, event: &Event) -> Result<(), AppendError> {
        let record = encode_all(std::slice::from_ref(event))?;
        let used = self.used + record.len() as u64;
        if used > self.half_bytes {
            return Err(AppendError::Full);
        }
        self.file.write_all_at(&record, self.half_offset(self.active) + self.used)?;
        self.put(USED_OFFSETS[self.active], used)?;
        self.used = used;
        Ok(())
    }

    /// Puts `snapshot` in the place of all events so far; `Full` when it would leave less than half a half free, so
    /// that compacting does not become the daily work.
    pub(crate) fn compact(&mut self, snapshot: &[Event]) -> Result<(), AppendError> {
        let records = encode_all(snapshot)?;
        let used = records.len() as u64;
        if used > self.half_bytes / 2 {
            return Err(AppendError::Full);
        }
        let other = 1 - self.active;
        self.file.write_all_at(&records, self.half_offset(other))?;
        self.put(USED_OFFSETS[other], used)?;
        self.put(ACTIVE_OFFSET, other as u64)?;
        (self.active, self.used) = (other, used);
        Ok(())
    }

    /// A registry twice as large that holds `snapshot`, in the place of this one.
    pub(crate) fn grown(&self, bus: u64, snapshot: &[Event]) -> io::Result<Registry> {
        Registry::create(self.path.as_deref(), bus, self.half_bytes * 2, snapshot)
    }

    /// Whether it was written since the machine was started; else everybody whom it names is dead.
    pub(crate) fn is_of_this_boot(&self) -> io::Result<bool> {
        Ok(get(&self.file, BOOT_OFFSET)? == boot()?)
    }

    fn half_offset(&self, half: usize) -> u64 {
        HALVES_OFFSET + half as u64 * self.half_bytes
    }

    fn put(&self, offset: u64, word: u64) -> io::Result<()> {
        self.file.write_all_at(&word.to_le_bytes(), offset)
    }
}

impl AsFd for Registry {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The bus whose registry is at `path`; `None` where there is none.
pub(crate) fn bus_at(path: &Path) -> io::Result<Option<u64>> {
    match File::open(path) {
        Ok(file) => get(&file, BUS_OFFSET).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The bus whose registry this is.
pub(crate) fn bus_of(registry: BorrowedFd<'_>) -> io::Result<u64> {
    get(&File::from(registry.try_clone_to_owned()?), BUS_OFFSET)
}

/// A file of ours alone, with all its bytes reserved where the file system can.
fn reserved_file(path: &Path, len: u64) -> io::Result<File> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    match fallocate(&file, FallocateFlags::empty(), 0, i64::try_from(len).map_err(io::Error::other)?) {
        Err(Errno::EOPNOTSUPP) => file.set_len(len)?,
        other => other?,
    }
    Ok(file)
}

/// Of the layout, and of the events, which change with the protocol.
const VERSION: u32 = LAYOUT_VERSION << 16 | PROTOCOL_VERSION;

/// Identifies the time since the machine was started.
fn boot() -> io::Result<u64> {
    let id = fs::read("/proc/sys/kernel/random/boot_id")?;
    Ok(id.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)))
}

/// The segment header from `layout` on (ARCHITECTURE.md §3.1).
fn header(len: u64, bus: u64) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[..4].copy_from_slice(&VERSION.to_le_bytes());
    bytes[4..8].copy_from_slice(&KIND.to_le_bytes());
    bytes[8..16].copy_from_slice(&len.to_le_bytes());
    bytes[16..].copy_from_slice(&bus.to_le_bytes());
    bytes
}

fn check_header(file: &File, len: u64) -> Result<(), RegistryError> {
    let versions = u64::from(VERSION) | u64::from(KIND) << 32;
    for (field, offset, expected) in [("magic", 0, MAGIC), ("version and kind", 8, versions), ("len_bytes", 16, len)] {
        let found = get(file, offset)?;
        if found != expected {
            return Err(RegistryError::Field { field, found, expected });
        }
    }
    Ok(())
}

fn get(file: &File, offset: u64) -> io::Result<u64> {
    let mut word = [0; 8];
    file.read_exact_at(&mut word, offset)?;
    Ok(u64::from_le_bytes(word))
}

fn encode_all(events: &[Event]) -> io::Result<Vec<u8>> {
    let mut records = Vec::new();
    for event in events {
        let bytes = postcard::to_stdvec(event).map_err(io::Error::other)?;
        records.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        records.extend_from_slice(&checksum(&bytes).to_le_bytes());
        records.extend_from_slice(&bytes);
    }
    Ok(records)
}

fn decode_all(mut records: &[u8]) -> Result<Vec<Event>, RegistryError> {
    let (total, mut events) = (records.len(), Vec::new());
    while !records.is_empty() {
        let garbled = |problem| RegistryError::Record { at: total - records.len(), problem };
        let (head, rest) = records.split_at_checked(RECORD_HEADER_BYTES).ok_or(garbled("no room for its header"))?;
        let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (bytes, rest) = rest.split_at_checked(word(0) as usize).ok_or(garbled("longer than the half"))?;
        if checksum(bytes) != word(4) {
            return Err(garbled("its checksum differs"));
        }
        events.push(postcard::from_bytes(bytes).map_err(|_| garbled("not an event"))?);
        records = rest;
    }
    Ok(events)
}

/// FNV-1a: guards against our own mistakes, not against an adversary, who cannot reach the registry.
fn checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn joined(incarnation: u64) -> Event {
        Event::Joined { incarnation, pid: 1, uid: 2, gids: vec![2] }
    }

    fn reopen(registry: &Registry) -> Result<(Registry, Vec<Event>), RegistryError> {
        Registry::open(registry.file.try_clone().unwrap().into(), None)
    }

    #[test]
    fn events_come_back_in_order() {
        let mut registry = Registry::create(None, 7, FIRST_HALF_BYTES, &[joined(0)]).unwrap();
        (1..100).for_each(|n| registry.append(&joined(n)).unwrap());
        let (mut again, events) = reopen(&registry).unwrap();
        assert_eq!(events, (0..100).map(joined).collect::<Vec<_>>());
        again.append(&joined(100)).unwrap();
        assert_eq!(reopen(&again).unwrap().1.len(), 101);
    }

    #[test]
    fn a_torn_append_never_happened() {
        let registry = Registry::create(None, 7, FIRST_HALF_BYTES, &[joined(0)]).unwrap();
        let record = encode_all(&[joined(1)]).unwrap();
        registry.file.write_all_at(&record, HALVES_OFFSET + registry.used).unwrap();
        assert_eq!(reopen(&registry).unwrap().1, [joined(0)]);
    }

    #[test]
    fn compaction_flips_the_halves_and_a_torn_one_never_happened() {
        let mut registry = Registry::create(None, 7, 4096, &[]).unwrap();
        let mut n = 0;
        while registry.append(&joined(n)).is_ok() {
            n += 1;
        }
        assert!(matches!(registry.append(&joined(n)), Err(AppendError::Full)));
        let before = reopen(&registry).unwrap().1;
        // Torn: the other half is written, `active` is not.
        let records = encode_all(&[joined(9)]).unwrap();
        registry.file.write_all_at(&records, registry.half_offset(1)).unwrap();
        registry.put(USED_OFFSETS[1], records.len() as u64).unwrap();
        assert_eq!(reopen(&registry).unwrap().1, before);
        registry.compact(&[joined(5)]).unwrap();
        registry.append(&joined(6)).unwrap();
        assert_eq!(reopen(&registry).unwrap().1, [joined(5), joined(6)]);
        registry.compact(&[joined(8)]).unwrap();
        assert_eq!(reopen(&registry).unwrap().1, [joined(8)]);
    }

    #[test]
    fn a_snapshot_that_fills_a_half_asks_for_growth() {
        let mut registry = Registry::create(None, 7, 4096, &[]).unwrap();
        let many: Vec<Event> = (0..400).map(joined).collect();
        assert!(matches!(registry.compact(&many), Err(AppendError::Full)));
        let grown = registry.grown(7, &many).unwrap();
        assert_eq!(reopen(&grown).unwrap().1, many);
    }

    #[test]
    fn every_garbled_byte_is_an_error_and_no_crash() {
        let events: Vec<Event> = (0..3).map(joined).collect();
        let registry = Registry::create(None, 7, 4096, &events).unwrap();
        for at in (0..24).chain(HALVES_OFFSET..HALVES_OFFSET + registry.used) {
            let mut byte = [0];
            registry.file.read_exact_at(&mut byte, at).unwrap();
            registry.file.write_all_at(&[byte[0] ^ 0x55], at).unwrap();
            assert!(reopen(&registry).is_err(), "byte {at}");
            registry.file.write_all_at(&byte, at).unwrap();
        }
        for (offset, word) in [(ACTIVE_OFFSET, 2), (USED_OFFSETS[0], u64::MAX), (USED_OFFSETS[0], registry.used - 1)] {
            let good = get(&registry.file, offset).unwrap();
            registry.put(offset, word).unwrap();
            assert!(reopen(&registry).is_err(), "word at {offset}");
            registry.put(offset, good).unwrap();
        }
        assert_eq!(reopen(&registry).unwrap().1, events);
    }
}
