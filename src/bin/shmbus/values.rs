//! Argument values: sizes with suffixes, topic names, start positions.

use std::num::ParseIntError;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::ValueEnum;
use shmbus::{Full, Mode, Right, Sequence, Start, Who, check_name, check_pattern};

/// A number with an optional suffix K, M or G (powers of 1,024).
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let trimmed = text.strip_suffix("iB").or_else(|| text.strip_suffix('B')).unwrap_or(text);
    let (digits, shift) = match trimmed.char_indices().last() {
        Some((at, 'k' | 'K')) => (&trimmed[..at], 10),
        Some((at, 'm' | 'M')) => (&trimmed[..at], 20),
        Some((at, 'g' | 'G')) => (&trimmed[..at], 30),
        _ => (trimmed, 0),
    };
    let number: u64 = digits.parse().map_err(|_| "write a number, as in 65536, 64K, 16M or 1G".to_owned())?;
    number.checked_mul(1 << shift).ok_or_else(|| "more than 2^64".to_owned())
}

/// A count.
pub(crate) fn number<N: std::str::FromStr>(text: &str) -> Result<N, String> {
    text.parse().map_err(|_| "write a whole number, as in 10".to_owned())
}

/// A size that is not 0.
pub(crate) fn positive_size(text: &str) -> Result<u64, String> {
    match size(text)? {
        0 => Err("must be at least 1".to_owned()),
        n => Ok(n),
    }
}

/// A topic name that could exist.
pub(crate) fn topic_name(text: &str) -> Result<String, String> {
    check_name(text).map(|()| text.to_owned()).map_err(|e| e.to_string())
}

/// A topic name, or a pattern of them.
pub(crate) fn topic_or_pattern(text: &str) -> Result<String, String> {
    check_pattern(text).map(|()| text.to_owned()).map_err(|e| e.to_string())
}

/// A right with those who get it.
pub(crate) type Grant = (Right, Vec<Who>);

/// `publish=alice,@traders`.
pub(crate) fn grant(text: &str) -> Result<Grant, String> {
    let (right, all) = text.split_once('=').ok_or("write RIGHT=WHO, as in publish=alice,@traders or subscribe=*")?;
    Ok((right.parse()?, all.split(',').map(str::parse).collect::<Result<_, _>>()?))
}

/// A duration with its unit: ms, s, m, h or d.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "write a number and a unit, as in 500ms, 5s, 10m, 2h or 1d".to_owned();
    let unit_at = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
    let unit_ms = match &text[unit_at..] {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..unit_at].parse().map_err(|_| wrong())?;
    match number.checked_mul(unit_ms) {
        Some(0) => Err("must be at least 1ms".to_owned()),
        Some(ms) => Ok(Duration::from_millis(ms)),
        None => Err("more than 2^64 ms".to_owned()),
    }
}

/// A duration as options carry it, in milliseconds.
pub(crate) fn whole_ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// A moment: seconds since 1970, or `-10m` for so long ago.
fn moment(text: &str) -> Result<SystemTime, String> {
    let time = match text.strip_prefix('-') {
        Some(ago) => SystemTime::now().checked_sub(duration(ago)?),
        None => text.parse().ok().and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds))),
    };
    time.ok_or_else(|| "write a time as seconds since 1970, or as -10m for ten minutes ago".to_owned())
}

/// `latest`, `oldest`, `last:N`, `last-per-key`, `time:T` or a sequence.
pub(crate) fn start(text: &str) -> Result<Start, String> {
    let wrong = |_: ParseIntError| "write latest, oldest, last:N, last-per-key, time:T or a sequence number".to_owned();
    Ok(match text.split_once(':') {
        None if text == "latest" => Start::Latest,
        None if text == "oldest" => Start::Oldest,
        None if text == "last-per-key" => Start::LastPerKey,
        Some(("last", count)) => Start::Last(count.parse().map_err(wrong)?),
        Some(("time", time)) => Start::Time(moment(time)?),
        _ => Start::Sequence(Sequence::new(text.parse().map_err(wrong)?)),
    })
}

/// A header: `NAME=VALUE`.
pub(crate) fn header(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(name, _)| !name.is_empty());
    pair.map(|(name, value)| (name.to_owned(), value.to_owned())).ok_or_else(|| "write NAME=VALUE".to_owned())
}

/// Two different cores, as in `0,1`.
pub(crate) fn two_cores(text: &str) -> Result<[usize; 2], String> {
    let cores = text.split_once(',').and_then(|(a, b)| Some([a.parse().ok()?, b.parse().ok()?]));
    cores.filter(|[a, b]| a != b).ok_or_else(|| "write two different cores, as in 0,1".to_owned())
}

/// [`Mode`] as an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ModeArg {
    /// Any number of publishers
    Many,
    /// One publisher at a time, any number of subscribers
    Exclusive,
    /// One publisher and one subscriber
    Channel,
}

impl From<ModeArg> for Mode {
    fn from(mode: ModeArg) -> Mode {
        match mode {
            ModeArg::Many => Mode::Many,
            ModeArg::Exclusive => Mode::Exclusive,
            ModeArg::Channel => Mode::Channel,
        }
    }
}

/// [`Full`] as an argument.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum FullArg {
    /// The publisher waits
    Block,
    /// The publisher gets an error at once
    Reject,
    /// The oldest messages go; whoever had not read them is told which
    Overwrite,
}

impl From<FullArg> for Full {
    fn from(full: FullArg) -> Full {
        match full {
            FullArg::Block => Full::Block,
            FullArg::Reject => Full::Reject,
            FullArg::Overwrite => Full::Overwrite,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(size("65536"), Ok(65536));
        assert_eq!(size("64K"), Ok(65536));
        assert_eq!(size("16MiB"), Ok(16 << 20));
        assert_eq!(size("1G"), Ok(1 << 30));
        for bad in ["", "K", "x", "-1", "1.5M", "99999999999G"] {
            assert!(size(bad).is_err(), "{bad:?}");
        }
        assert!(positive_size("0").is_err());
    }

    #[test]
    fn durations() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("10m"), Ok(Duration::from_secs(600)));
        assert_eq!(duration("2d"), Ok(Duration::from_secs(172_800)));
        for bad in ["", "5", "s", "0s", "-5s", "1.5s", "5 s", "99999999999999999d"] {
            assert!(duration(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn starts() {
        assert!(matches!(start("last:7"), Ok(Start::Last(7))));
        assert!(matches!(start("12"), Ok(Start::Sequence(s)) if s.get() == 12));
        assert_eq!(start("last-per-key"), Ok(Start::LastPerKey));
        assert_eq!(start("time:5"), Ok(Start::Time(UNIX_EPOCH + Duration::from_secs(5))));
        assert!(matches!(start("time:-10m"), Ok(Start::Time(time)) if time < SystemTime::now()));
        for bad in ["", "last:", "newest", "-1", "time:", "time:noon", "time:-5"] {
            assert!(start(bad).is_err(), "{bad:?}");
        }
    }
}
