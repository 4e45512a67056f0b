//! Slurm's short forms of lists.

/// Returns the first host of a list such as `gpu[07-09,12],login1`.
pub(super) fn first_host(list: &str) -> Option<String> {
    let end = list.find([',', '[']).unwrap_or(list.len());
    let (prefix, rest) = list.split_at(end);
    let Some(inside) = rest.strip_prefix('[') else { return Some(prefix.to_owned()).filter(|host| !host.is_empty()) };
    let (ranges, after) = inside.split_once(']')?;
    let number = ranges.split([',', '-']).next().filter(|number| number.chars().all(|c| c.is_ascii_digit()))?;
    let suffix = after.split(',').next().unwrap_or("");
    // A second bracket, as in rack[1-2]node[3-4], is expanded in the same way.
    Some(format!("{prefix}{number}{}", if suffix.is_empty() { String::new() } else { first_host(suffix)? }))
}

/// Returns the tasks of a node in a list such as `4(x2),3`.
pub(super) fn tasks_of_node(list: &str, node: usize) -> Option<usize> {
    let mut left = node;
    for part in list.split(',') {
        let (tasks, nodes) = match part.split_once("(x") {
            Some((tasks, nodes)) => (tasks, nodes.strip_suffix(')')?.parse().ok()?),
            None => (part, 1),
        };
        if left < nodes {
            return tasks.trim().parse().ok();
        }
        left -= nodes;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_hosts() {
        let cases = [
            ("node1", Some("node1")),
            ("a-3,b", Some("a-3")),
            ("gpu[07-09,12],login1", Some("gpu07")),
            ("n[1,4].cluster.org", Some("n1.cluster.org")),
            ("rack[1-2]node[3-4]", Some("rack1node3")),
            ("", None),
            ("gpu[", None),
            ("gpu[x]", None),
        ];
        for (list, host) in cases {
            assert_eq!(first_host(list).as_deref(), host, "{list}");
        }
    }

    #[test]
    fn lists_of_tasks() {
        let tasks = |list, node| tasks_of_node(list, node);
        assert_eq!([tasks("4(x2),3", 0), tasks("4(x2),3", 1), tasks("4(x2),3", 2)], [Some(4), Some(4), Some(3)]);
        assert_eq!([tasks("4(x2),3", 3), tasks("", 0), tasks("2(y", 0)], [None; 3]);
    }
}
