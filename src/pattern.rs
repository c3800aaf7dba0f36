//! Patterns of topic names: `*` stands for one token, `>` at the end for one or more.

use crate::error::NameError;
use crate::topic::{MAX_NAME_BYTES, check_name};

/// Whether `text` is meant as a pattern and not as a name.
pub fn is_pattern(text: &str) -> bool {
    text.contains(['*', '>'])
}

/// Checks a pattern: a topic name in which whole tokens may be `*` and the last one `>`. A plain name is a pattern, too.
pub fn check_pattern(pattern: &str) -> Result<(), NameError> {
    if pattern.len() > MAX_NAME_BYTES {
        return Err(NameError::TooLong { found: pattern.len(), max: MAX_NAME_BYTES });
    }
    let mut parts = pattern.split('.').peekable();
    while let Some(part) = parts.next() {
        match part {
            "" if pattern.is_empty() => return Err(NameError::Empty),
            "" => return Err(NameError::EmptyToken),
            "*" => {}
            ">" if parts.peek().is_none() => {}
            _ if is_pattern(part) => return Err(NameError::Wildcard),
            literal => check_name(literal)?,
        }
    }
    Ok(())
}

/// Whether a checked pattern stands for the name. Names that begin with an underscore (reply inboxes) are meant only by
/// patterns that say so: a wildcard in the first place does not stand for them.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    if name.starts_with('_') && (pattern.starts_with('*') || pattern.starts_with('>')) {
        return false;
    }
    let mut tokens = name.split('.');
    for part in pattern.split('.') {
        match (part, tokens.next()) {
            (_, None) => return false,
            (">", Some(_)) => return true,
            ("*", Some(_)) => {}
            (literal, Some(token)) if literal == token => {}
            _ => return false,
        }
    }
    tokens.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wildcards_follow_the_token_rules() {
        let cases = [
            ("orders.*", "orders.new", true),
            ("orders.*", "orders", false),
            ("orders.*", "orders.new.eu", false),
            ("orders.>", "orders.new", true),
            ("orders.>", "orders.new.eu", true),
            ("orders.>", "orders", false),
            ("orders.>", "ordersx.new", false),
            ("*.new", "orders.new", true),
            ("*.new.*", "orders.new.eu", true),
            ("*", "orders", true),
            ("*", "orders.new", false),
            (">", "orders.new.eu", true),
            ("orders", "orders", true),
            ("orders", "orders.new", false),
            (">", "_inbox.1", false),
            ("*.1", "_inbox.1", false),
            ("_inbox.>", "_inbox.1", true),
            ("a.*", "a._b", true),
        ];
        for (pattern, name, expected) in cases {
            assert_eq!(check_pattern(pattern), Ok(()), "{pattern}");
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn bad_patterns_are_refused() {
        for bad in ["", ".", "a.", "a..*", "a*", "a.b>", ">.a", "a.>.b", "a b.*", "**", &"x".repeat(201)] {
            assert!(check_pattern(bad).is_err(), "{bad:?}");
        }
    }
}
