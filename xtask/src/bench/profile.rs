//! Which functions the instructions of ring 0 and dom0 belong to.

use super::columns::Lab;
use super::counts::Counts;
use anyhow::{Result, anyhow};
use std::collections::BTreeMap;

/// How many functions are named.
const SHOWN: usize = 12;

/// The functions with the most instructions, one line each: share of ring 0 and dom0, instructions, function. First those
/// with everything that is inlined in them, then what is inlined by itself.
pub(super) fn lines(lab: &Lab, counts: &Counts, operations: u32) -> Result<Vec<String>> {
    let load = |name| -> Result<addr2line::Loader> {
        addr2line::Loader::new(lab.image(name)?).map_err(|why| anyhow!("no debug information in {name}: {why}"))
    };
    let (hypervisor, dom0) = (load("hypervisor")?, load("dom0")?);
    let (mut whole, mut inlined) = (BTreeMap::<String, u64>::new(), BTreeMap::<String, u64>::new());
    for (address, count) in &counts.places {
        // Both lie in the upper half, dom0 in its last 2 GiB.
        let (owner, image) = if *address >> 31 == u64::MAX >> 31 { ("dom0", &dom0) } else { ("ring0", &hypervisor) };
        let (symbol, inner) = names(image, *address);
        *inlined.entry(format!("{owner:<6}{inner} in {symbol}")).or_default() += count;
        *whole.entry(format!("{owner:<6}{symbol}")).or_default() += count;
    }
    let total = counts.places.iter().map(|(_, count)| count).sum::<u64>().max(1);
    let line = |(name, count): &(String, u64)| {
        #[allow(clippy::cast_precision_loss, reason = "for people")]
        let share = *count as f64 * 100.0 / total as f64;
        format!("{share:5.1} % {:>14} {name}", count / u64::from(operations))
    };
    let most = |functions: BTreeMap<String, u64>| {
        let mut functions: Vec<_> = functions.into_iter().collect();
        functions.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        functions.truncate(SHOWN);
        functions.iter().map(line).collect::<Vec<_>>()
    };
    let mut lines = most(whole);
    lines.push(String::new());
    lines.extend(most(inlined));
    Ok(lines)
}

/// The function whose symbol an address belongs to, and the innermost one there.
fn names(image: &addr2line::Loader, address: u64) -> (String, String) {
    let symbol = image.find_symbol(address).map_or_else(|| format!("{address:#x}"), short);
    let inner = image.find_frames(address).ok().and_then(|mut frames| frames.next().ok().flatten());
    let inner = inner.and_then(|frame| Some(short(&frame.function?.raw_name().ok()?)));
    (symbol.clone(), inner.unwrap_or(symbol))
}

/// A function's name without the hashes in it.
fn short(name: &str) -> String {
    format!("{:#}", addr2line::demangle_auto(name.into(), None))
}
