//! How much memory may still be used: by the machine and by the cgroup we run in.

use std::fs;
use std::path::Path;

/// The smaller of what the machine has available and what the cgroup still allows, in bytes.
pub(crate) fn available_bytes() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_available(&text));
    let cgroup = fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| cgroup_room(&text));
    machine.unwrap_or(1 << 30).min(cgroup.unwrap_or(u64::MAX))
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// The tightest room on the way from our cgroup (version 2) up to the root.
fn cgroup_room(self_cgroup: &str) -> Option<u64> {
    let path = self_cgroup.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let root = Path::new("/sys/fs/cgroup");
    root.join(path).ancestors().take_while(|dir| dir.starts_with(root)).filter_map(room_of).min()
}

fn room_of(dir: &Path) -> Option<u64> {
    let read = |name: &str| fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
    Some(read("memory.max")?.saturating_sub(read("memory.current")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_format() {
        assert_eq!(mem_available("MemTotal: 8 kB\nMemAvailable:    1234 kB\n"), Some(1234 * 1024));
        assert_eq!(mem_available("MemTotal: 8 kB\n"), None);
        assert!(available_bytes() > 0);
    }
}
