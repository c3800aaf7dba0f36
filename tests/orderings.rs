//! Each synchronizing access names its partner: who loads with `A-TAG` reads what somebody stored with `R-TAG`. A tag at
//! one end only is an ordering that nobody relies on, or a partner that has moved without it. At a fence
//! between a store and a look, `R-` is what was stored before it, `A-` what is looked at behind it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Where each tag stands, as `file:line`; the key is the tag's side and its name.
type Places = BTreeMap<(char, String), Vec<String>>;

#[test]
fn no_ordering_is_without_its_partner() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut places = Places::new();
    for file in sources(&root.join("src")) {
        let text = fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let name = file.strip_prefix(root).expect("found below it").display().to_string();
        collect(&name, &text, &mut places);
    }
    assert!(!places.is_empty(), "no tag found at all; has the notation changed?");
    let orphans = orphans(&places);
    assert!(orphans.is_empty(), "orderings without a partner:\n{}", orphans.join("\n"));
}

#[test]
fn an_orphan_is_found() {
    let mut places = Places::new();
    collect("a.rs", "x(); // Acquire: A-ONE pairs with R-ONE.\n", &mut places);
    collect(
        "b.rs",
        "\n// Release: R-ONE pairs with A-ONE. R-TWO's is \"A-THREE\".\nlet s = \"R-FOUR\";\n",
        &mut places,
    );
    collect("c.rs", "// Release: R-ONE; not an ordering: BAR-FIVE, A-six, A-7.\n", &mut places);
    assert_eq!(orphans(&places), ["b.rs:2: A-THREE has no R-THREE", "b.rs:2: R-TWO has no A-TWO"]);
}

/// Every `.rs` file below `folder`.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
        let path = entry.expect("a readable folder").path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// Notes the tags that `text` carries at the accesses themselves. A comment names both ends; its own is the first, the
/// partner is what follows "pairs with". So an end counts as present only where it comes before those words.
fn collect(name: &str, text: &str, places: &mut Places) {
    for (number, line) in text.lines().enumerate() {
        let Some((_, comment)) = line.split_once("//") else { continue };
        let own = comment.split("pairs with").next().unwrap_or(comment);
        let after = comment.split("pairs with").skip(1).flat_map(|rest| rest.split_once(". ").map(|(_, rest)| rest));
        for part in std::iter::once(own).chain(after) {
            for word in part.split(|c: char| !c.is_ascii_alphanumeric() && c != '-') {
                let tag =
                    word.strip_prefix("A-").map(|tag| ('A', tag)).or(word.strip_prefix("R-").map(|tag| ('R', tag)));
                if let Some((side, tag)) = tag
                    && !tag.is_empty()
                    && tag.bytes().all(|byte| byte.is_ascii_uppercase())
                {
                    places.entry((side, tag.to_owned())).or_default().push(format!("{name}:{}", number + 1));
                }
            }
        }
    }
}

/// What stands at one end only.
fn orphans(places: &Places) -> Vec<String> {
    let partner = |side: char| if side == 'A' { 'R' } else { 'A' };
    let alone = places.iter().filter(|((side, tag), _)| !places.contains_key(&(partner(*side), tag.clone())));
    let line = |place: &String, side: char, tag: &str| format!("{place}: {side}-{tag} has no {}-{tag}", partner(side));
    let mut lines: Vec<_> =
        alone.flat_map(|((side, tag), at)| at.iter().map(|place| line(place, *side, tag))).collect();
    lines.sort();
    lines
}
